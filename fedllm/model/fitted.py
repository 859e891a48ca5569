"""The federation's adapter on one model: the part that is trained there, and the rest, which is applied as it is.

Every site applies the same product, whatever it can train of it: see :mod:`fedllm.lora.cut`. On the server, and where
nothing is trained, the part is the whole trained adapter and the rest the side factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from peft import PeftModel

from fedllm.lora.choice import own_spec
from fedllm.lora.cut import narrow, own_components, rest_of, rest_ranks
from fedllm.lora.pairs import pairs_of, with_rank
from fedllm.model.adapter import attach_adapter, layout_of, read_adapter, write_adapter
from fedllm.model.rest import attach_rest, write_rest
from fedllm.model.spec import AdapterSpec, LoraSpec
from fedllm.update import Arrays, Layout, check_arrays

if TYPE_CHECKING:
    from fedllm.model.build import LoadedBase


@dataclass(frozen=True)
class FittedAdapter:
    """A model that carries the federation's adapter.

    Attributes:
        model: The base with the part that is trained, and the rest beside it where there is any.
        layout: The federation's.
        own_layout: Of the part that is trained here.
        rank: Components of LoRA that are trained here.
        ratio: The scale that they are trained in over the federation's.
        scale: The federation's.
    """

    model: PeftModel
    layout: Layout
    own_layout: Layout
    rank: int = 0
    ratio: float = 1.0
    scale: float = 1.0

    def write(self, arrays: Arrays, *, truncated: bool = False) -> None:
        """Put a state into the model.

        Args:
            arrays: The federation's adapter.
            truncated: Leave the rest away, as strategies have it that cut the adapter to a site's rank.

        Raises:
            LayoutError: The arrays do not fit the layout.
            NonFiniteError: A value is NaN or infinite.
        """
        check_arrays(arrays, self.layout, "the adapter to load")
        write_adapter(self.model, self.own_layout, self._part(arrays))
        if any(rest_ranks(self.layout, self.rank).values()):
            rest = {pair.layer: rest_of(pair, arrays, self.rank, self.scale) for pair in pairs_of(self.layout)}
            write_rest(self.model, {layer: (0 * b if truncated else b, a) for layer, (b, a) in rest.items()})

    def read(self, start: Arrays) -> Arrays:
        """Return the federation's adapter as it was trained here.

        Args:
            start: What was written before training.
        """
        own, began = read_adapter(self.model, self.own_layout), self._part(start)
        trained = dict(start)
        for spec in self.own_layout.tensors:
            values = own[spec.name]
            if own[spec.name].shape != start[spec.name].shape or self.ratio != 1:
                values = start[spec.name].copy()
                values[own_components(spec, self.rank)] += (own[spec.name] - began[spec.name]) * self._factor(spec.role)
            trained[spec.name] = values
        return trained

    def _part(self, arrays: Arrays) -> Arrays:
        """Return what is trained here of the federation's adapter."""
        own = narrow(arrays, self.own_layout, self.rank)
        if self.ratio == 1:
            return own
        return {spec.name: own[spec.name] / self._factor(spec.role) for spec in self.own_layout.tensors}

    def _factor(self, role: str) -> np.float32:
        """Return what takes a tensor into the federation's scale; the scale is B's business."""
        return np.float32(self.ratio if role == "lora_B" else 1.0)


def fit_adapter(base: LoadedBase, adapter: AdapterSpec, rank: int = 0, alpha: float = 0.0) -> FittedAdapter:
    """Put the federation's adapter on a base, in place of the one that it carries.

    Args:
        base: The base.
        adapter: The federation's.
        rank: Components of LoRA that are trained here, 0 for all.
        alpha: LoRA alpha that they are trained with, 0 for the federation's.

    Raises:
        ConfigError: Rank or alpha is out of the operator's bounds.
        ModelError: The target modules are not in the model.
    """
    if not isinstance(adapter, LoraSpec):
        model = attach_adapter(base, adapter)
        layout = layout_of(model)
        return FittedAdapter(model, layout, layout)
    own = own_spec(adapter, rank, alpha)
    model = attach_adapter(base, own)
    own_layout = layout_of(model)
    layout = (
        own_layout
        if adapter.num_heads or adapter.personal_rank
        else with_rank(own_layout, adapter.rank, adapter.side_rank)
    )
    attach_rest(model, rest_ranks(layout, own.rank))
    return FittedAdapter(model, layout, own_layout, own.rank, own.scale / adapter.scale, adapter.scale)
