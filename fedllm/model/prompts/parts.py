"""A soft prompt as several parameters, one for each tensor that travels, where PEFT has a single one for all layers.

Shape legend: M virtual tokens, W width of all parts together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import torch
from torch import nn


class PromptParts(nn.Module):
    """Takes the place of PEFT's prompt or prefix encoder; its parts lie side by side in what that would hold.

    Args:
        whole: PEFT's parameter [M, W].
        names: Of the parts, which are equally wide.
    """

    def __init__(self, whole: torch.Tensor, names: Sequence[str]) -> None:
        super().__init__()
        self._names = tuple(names)
        parts = whole.detach().chunk(len(self._names), dim=1)
        self.parts = nn.ParameterList([nn.Parameter(part.clone()) for part in parts])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the virtual tokens [..., W] of the numbers int64 [...]."""
        return self._whole()[tokens]

    @property
    def embedding(self) -> SimpleNamespace:
        """What PEFT looks at: something with a ``weight`` [M, W]."""
        return SimpleNamespace(weight=self._whole())

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parts by name."""
        return zip(self._names, self.parts, strict=True)

    def _whole(self) -> torch.Tensor:
        return torch.cat(list(self.parts), dim=1)
