"""A soft prompt as several parameters, one for each tensor of the layout, where PEFT has a single one.

Shape legend: M virtual tokens, W width of a whole row of parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace

import torch
from torch import nn


class PromptParts(nn.Module):
    """Takes the place of PEFT's prompt or prefix encoder.

    Its parts lie in what that would hold as in a table: in a row those of the layers side by side, the sites' own row below
    the shared one.

    Args:
        whole: PEFT's parameter [M, W].
        rows: Names of each row's parts, which are equally wide, by the row's number of virtual tokens, in order.
    """

    def __init__(self, whole: torch.Tensor, rows: Sequence[tuple[int, Sequence[str]]]) -> None:
        super().__init__()
        self._rows = [tuple(names) for _, names in rows]
        self.num_shared = rows[0][0]
        strips = whole.detach().split([num_tokens for num_tokens, _ in rows])
        parts = [
            part for strip, names in zip(strips, self._rows, strict=True) for part in strip.chunk(len(names), dim=1)
        ]
        self.parts = nn.ParameterList([nn.Parameter(part.clone()) for part in parts])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the virtual tokens [..., W] of the numbers int64 [...]."""
        return self._whole()[tokens]

    @property
    def embedding(self) -> SimpleNamespace:
        """What PEFT looks at: something with a ``weight`` [M, W]."""
        return SimpleNamespace(weight=self._whole())

    def by_name(self) -> Mapping[str, nn.Parameter]:
        """Return the parts by name, in order."""
        names = [name for row in self._rows for name in row]
        return dict(zip(names, self.parts, strict=True))

    def _whole(self) -> torch.Tensor:
        parts: Iterator[nn.Parameter] = iter(self.parts)
        return torch.cat([torch.cat([next(parts) for _ in row], dim=1) for row in self._rows])
