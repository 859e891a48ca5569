"""A server learning rate that falls over the rounds.

Strong sparsification with error feedback needs it: with a constant rate of 1 the residual keeps feeding noise of its own
size into the global state (top-1 % diverges), with a falling one it dies out (Karimireddy et al., ICML 2019,
arXiv 1901.09847, for the step sizes under which error feedback converges).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedllm.update import Arrays
from strategies.slots import OptimizerState, ServerOptimizer

Course = Literal["linear", "cosine"]


@dataclass(frozen=True)
class Annealed:
    """Any server optimizer with its step scaled down over the rounds.

    Args:
        optimizer: What decides the step.
        course: How the scale falls from 1 in the first round to `final` in the last.
        final: Scale of the last round, in [0, 1].
        num_rounds: Rounds of the federation; later ones keep `final`.
    """

    optimizer: ServerOptimizer
    course: Course
    final: float
    num_rounds: int

    def apply(self, state: OptimizerState, params: Arrays, delta: Arrays) -> tuple[Arrays, OptimizerState]:
        """Return the moved adapter and the next state."""
        moved, next_state = self.optimizer.apply(state, params, delta)
        scale = np.float64(self.scale(state.step))
        return params | {name: _between(params[name], moved[name], scale) for name in delta}, next_state

    def scale(self, step: int) -> float:
        """Return the scale of the step after `step` earlier ones."""
        progress = min(1.0, step / max(1, self.num_rounds - 1))
        fall = progress if self.course == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return 1 - (1 - self.final) * fall


def _between(start: NDArray[np.float32], end: NDArray[np.float32], scale: np.float64) -> NDArray[np.float32]:
    origin = start.astype(np.float64)
    return np.asarray(origin + scale * (end - origin), np.float32)
