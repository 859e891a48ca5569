"""What a site does with a state: decided by the strategy, carried by every instruction, read alike at both ends.

Which tensors are trained and which travel follows from the layout and this description alone, so a part of an adapter
travels as a payload of a smaller layout that both ends derive for themselves and hold each other to by its digest.

Evolution: fields are only added, with a default that means what was done before.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel, ConfigDict

from fedllm.errors import ConfigError, explain
from fedllm.update import Layout, TensorSpec


class ClientWork(BaseModel):
    """What a site does.

    Attributes:
        trainable: Roles of the tensors that are trained and sent, empty for all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    trainable: tuple[str, ...] = ()

    def trained(self, layout: Layout) -> Layout:
        """Return the tensors that a site trains.

        Raises:
            ConfigError: There are none.
        """
        return self._part(layout, self._trains, "train")

    def sent(self, layout: Layout) -> Layout:
        """Return the tensors that an update holds.

        Raises:
            ConfigError: There are none.
        """
        return self._part(layout, self._trains, "send")

    def _trains(self, spec: TensorSpec) -> bool:
        return not self.trainable or spec.role in self.trainable

    def _part(self, layout: Layout, belongs: Callable[[TensorSpec], bool], what: str) -> Layout:
        part = layout.only([spec.name for spec in layout.tensors if belongs(spec)])
        if not part.tensors:
            roles = ", ".join(sorted({spec.role for spec in layout.tensors}))
            fix = "Choose a strategy that fits the kind of adapter."
            raise ConfigError(
                explain(f"the strategy leaves nothing to {what}", expected=f"some of {roles}", found=self, fix=fix)
            )
        return part
