"""An update of a site that trains fewer components, as one of the federation's shape.

Every aggregator then sees updates of one shape: what the site left as it was has a delta of zero
(:mod:`fedllm.lora.cut`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedllm.lora.cut import own_components
from fedllm.update import Layout
from strategies.slots import Accumulator, UpdateSource


@dataclass(frozen=True)
class Widened:
    """An :class:`UpdateSource` in the federation's shapes.

    Attributes:
        update: The site's, in its own shapes.
        layout: The federation's tensors.
        rank: Components that the site trains.
    """

    update: UpdateSource
    layout: Layout
    rank: int

    @property
    def is_partial(self) -> bool:
        """Whether the site's codec left coordinates out."""
        return self.update.is_partial

    def read(self, name: str) -> NDArray[np.float32]:
        """Return one tensor, zero beyond the site's components."""
        spec = self.layout[name]
        wide = np.zeros(spec.shape, np.float32)
        wide[own_components(spec, self.rank)] = self.update.read(name)
        return wide

    def add_to(self, name: str, accumulator: Accumulator, weight: float, weights: Accumulator | None = None) -> None:
        """Add one tensor; components that the site does not train count as sent, since it applies them as they are."""
        own = own_components(self.layout[name], self.rank)
        part, counted = (np.zeros(accumulator[own].shape) for _ in range(2))
        self.update.add_to(name, part, weight, None if weights is None else counted)
        accumulator[own] += part
        if weights is not None:
            outside = np.ones(weights.shape, bool)
            outside[own] = False
            weights[outside] += weight
            weights[own] += counted
