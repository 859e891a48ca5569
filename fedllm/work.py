"""What a site does with a state: decided by the strategy, carried by every instruction, read alike at both ends.

Which tensors are trained, which travel and which stay follows from the layout and this description alone, so a part of an
adapter travels as a payload of a smaller layout that both ends derive for themselves and hold each other to by its digest.

A strategy may send more than the adapter: *control variates* travel as tensors of role ``control`` beside it, named
``control/<tensor>``, in states and in updates alike.

Evolution: fields are only added, with a default that means what was done before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fedllm.errors import ConfigError, LayoutError, explain
from fedllm.update import Layout, TensorSpec

CONTROL = "control"
"""Role of control variates, and what their names begin with."""

PERSONAL = ("personal_prompt", "personal_prefix", "personal_A", "personal_B")
"""Roles of the tensors that every site trains for itself: they never leave it, whatever the strategy."""


class ClientWork(BaseModel):
    """What a site does.

    Attributes:
        trainable: Roles of the tensors that are trained, empty for all.
        private: Roles of the tensors that never leave the site, besides those of :data:`PERSONAL`.
        shared_depth: Share of the model's layers, from the bottom, whose tensors are shared; those of the layers above stay
            at the site. Tensors that belong to no layer are shared.
        proximal: Strength of the pull towards the received state, FedProx's mu; 0 for none.
        alignment: Share of the turn towards the received factors that a site makes before it hands in, as FedRot does;
            0 for none.
        control_variates: Correct every step by control variates, as SCAFFOLD does, and send their changes.
        personal_share: Share of the site's own adapter in the sum with the federation's (:mod:`fedllm.model.dual`): it is
            trained with this share before the other one is trained alone, and used with it, scaled by likeness. 0 for no
            such adapter.
        share: Share of those tensors that an update holds which a site really sends, of its own choice; it says which.
        carries_residual: What a lossy codec dropped may be added to the site's next update. Not where the server makes
            other factors of the same product, in which it would mean something else.
        truncates: A site of smaller rank applies its own components only while it trains, in place of the whole.
        pruning: Share of its LoRA components that a site goes on with where the others shrank while it trained, as HetLoRA
            has it; 1 to keep all.
        tail_penalty: Strength of the pull of those others towards zero, HetLoRA's lambda.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    trainable: tuple[str, ...] = ()
    private: tuple[str, ...] = ()
    shared_depth: Annotated[float, Field(gt=0, le=1)] = 1.0
    proximal: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    alignment: Annotated[float, Field(ge=0, le=1)] = 0.0
    control_variates: bool = False
    personal_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    carries_residual: bool = True
    truncates: bool = False
    pruning: Annotated[float, Field(gt=0, le=1)] = 1.0
    tail_penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    def state(self, adapter: Layout) -> Layout:
        """Return the tensors of a global state: the adapter's, and the control variates of those that are shared."""
        if not self.control_variates:
            return adapter
        return Layout((*adapter.tensors, *map(_control_of, self.sent(adapter).tensors)))

    def trained(self, layout: Layout) -> Layout:
        """Return the tensors that a site trains.

        Args:
            layout: Of the adapter or of the state.

        Raises:
            ConfigError: There are none.
        """
        return self._part(layout, self._trains, "train")

    def sent(self, state: Layout) -> Layout:
        """Return the tensors that an update holds.

        Raises:
            ConfigError: There are none.
        """
        shares = self._sharing(state)
        return self._part(state, lambda spec: spec.role == CONTROL or shares(spec), "send")

    def kept(self, layout: Layout) -> Layout:
        """Return the trained tensors that stay at the site; there may be none."""
        shares = self._sharing(layout)
        return layout.only([spec.name for spec in self.trained(layout).tensors if not shares(spec)])

    def chosen(self, sent: Layout, names: Collection[str]) -> Layout:
        """Return the tensors that an update really holds.

        Args:
            sent: Those that it may hold.
            names: Those that the site chose, empty where it has no choice.

        Raises:
            LayoutError: They are not as many as they should be, or are others.
        """
        expected = self.num_chosen(sent) if self.share < 1 else 0
        if len(set(names)) != expected or len(names) != expected:
            raise LayoutError(explain("a site sends another share of its update", expected=expected, found=len(names)))
        return sent.only(names) if names else sent

    def num_chosen(self, sent: Layout) -> int:
        """Return how many of the tensors that an update may hold it really holds."""
        return math.ceil(round(self.share * len(sent.tensors), 6))  # 0.07 * 100 is a little more than 7

    def _trains(self, spec: TensorSpec) -> bool:
        return spec.role != CONTROL and (not self.trainable or spec.role in self.trainable)

    def _sharing(self, layout: Layout) -> Callable[[TensorSpec], bool]:
        """Return whether a trained tensor of a layout is shared."""
        num_layers = 1 + max((layer_of(name) for name in layout.names), default=-1)
        first_private = math.ceil(self.shared_depth * num_layers) if self.shared_depth < 1 else num_layers
        private = (*self.private, *PERSONAL)

        def shares(spec: TensorSpec) -> bool:
            return self._trains(spec) and spec.role not in private and layer_of(spec.name) < max(1, first_private)

        return shares

    def _part(self, layout: Layout, belongs: Callable[[TensorSpec], bool], what: str) -> Layout:
        part = layout.only([spec.name for spec in layout.tensors if belongs(spec)])
        if not part.tensors:
            roles = ", ".join(sorted({spec.role for spec in layout.tensors}))
            fix = "Choose a strategy that fits the kind of adapter."
            raise ConfigError(
                explain(f"the strategy leaves nothing to {what}", expected=f"some of {roles}", found=self, fix=fix)
            )
        return part


def layer_of(name: str) -> int:
    """Return the number of the layer that a tensor belongs to, from 0 at the bottom; -1 for one that belongs to none.

    It is the first whole number among the parts of the name, as in ``base_model.model.model.layers.7.self_attn...``.
    """
    return next((int(part) for part in name.split(".") if part.isdecimal()), -1)


def adapter_of(state: Layout) -> Layout:
    """Return the adapter's tensors of a state."""
    return state.only([spec.name for spec in state.tensors if spec.role != CONTROL])


def common_of(adapter: Layout) -> Layout:
    """Return the adapter's tensors without those that every site trains for itself: what the global adapter is."""
    return adapter.only([spec.name for spec in adapter.tensors if spec.role not in PERSONAL])


def control_of(state: Layout) -> Layout:
    """Return the control variates of a state; there may be none."""
    return state.only([spec.name for spec in state.tensors if spec.role == CONTROL])


def control_name(name: str) -> str:
    """Return the name of a tensor's control variate."""
    return f"{CONTROL}/{name}"


def is_control(name: str) -> bool:
    """Tell whether a tensor of this name is a control variate."""
    return name.startswith(f"{CONTROL}/")


def _control_of(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(control_name(spec.name), spec.shape, "float32", CONTROL)
