"""Updates that say nothing about some tensors, or about some virtual tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import LayoutError, explain
from fedllm.model.prompts.tensors import TOKEN_ROLES
from fedllm.update import Layout
from strategies.slots import Accumulator, UpdateSource


@dataclass(frozen=True)
class SomeTensors:
    """An :class:`UpdateSource` that says nothing about the tensors which it does not hold.

    Attributes:
        source: What it holds.
        held: Those tensors.
        layout: All tensors that an update may hold.
    """

    source: UpdateSource
    held: Layout
    layout: Layout

    @property
    def is_partial(self) -> bool:
        """Something is left out."""
        return True

    def read(self, name: str) -> NDArray[np.float32]:
        """Return one tensor, zero where it was not sent."""
        return self.source.read(name) if name in self.held else np.zeros(self.layout[name].shape, np.float32)

    def add_to(self, name: str, accumulator: Accumulator, weight: float, weights: Accumulator | None = None) -> None:
        """Add one tensor, if it was sent."""
        if name in self.held:
            self.source.add_to(name, accumulator, weight, weights)


@dataclass(frozen=True)
class FirstTokens:
    """An :class:`UpdateSource` of a site that uses a soft prompt's first tokens; it says nothing of the others.

    Attributes:
        source: The update.
        count: How many tokens the site uses.
        layout: The update's tensors.
    """

    source: UpdateSource
    count: int
    layout: Layout

    @property
    def is_partial(self) -> bool:
        """Something is left out."""
        return True

    def read(self, name: str) -> NDArray[np.float32]:
        """Return one tensor, zero where the site uses no token."""
        values = self.source.read(name).copy()
        values[self._rows(name).stop or len(values) :] = 0
        return values

    def add_to(self, name: str, accumulator: Accumulator, weight: float, weights: Accumulator | None = None) -> None:
        """Add the rows of the tokens that the site uses."""
        sums, coverage = np.zeros(accumulator.shape), np.zeros(accumulator.shape)
        self.source.add_to(name, sums, weight, coverage)
        rows = self._rows(name)
        accumulator[rows] += sums[rows]
        if weights is not None:
            weights[rows] += coverage[rows]

    def _rows(self, name: str) -> slice:
        return slice(self.count if self.layout[name].role in TOKEN_ROLES else None)


def in_part(source: UpdateSource, layout: Layout, tensors: Collection[str], num_virtual_tokens: int) -> UpdateSource:
    """Return an update as what it says of the tensors that an update may hold.

    Args:
        source: The update.
        layout: Those tensors.
        tensors: Names of the tensors that it holds, empty for all.
        num_virtual_tokens: How many virtual tokens it speaks of, 0 for all.

    Raises:
        LayoutError: A tensor is unknown.
    """
    if num_virtual_tokens:
        source = FirstTokens(source, num_virtual_tokens, layout)
    return SomeTensors(source, layout.only(tensors), layout) if tensors else source


def check_length(layout: Layout, num_virtual_tokens: int, fewest: int) -> None:
    """Refuse a site's report of how many virtual tokens it uses, 0 for all.

    Args:
        layout: The adapter's tensors.
        num_virtual_tokens: What the site says.
        fewest: What the operator allows, 0 for all tokens only.

    Raises:
        LayoutError: It is out of bounds.
    """
    most = max((spec.shape[0] for spec in layout.tensors if spec.role in TOKEN_ROLES), default=0)
    if num_virtual_tokens and not (fewest or most) <= num_virtual_tokens <= most:
        expected = f"{fewest or most} to {most}"
        raise LayoutError(
            explain("a site's prompt length is out of bounds", expected=expected, found=num_virtual_tokens)
        )
