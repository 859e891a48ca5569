"""Attackers who know every honest update, on plain matrices: the worst case that a robust rule is meant for.

Shape legend: H honest updates, F attackers, D coordinates. Attackers who know their own update only are in
:mod:`client_app.attacks`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
CohortAttack = Callable[[Matrix, int, np.random.Generator], Matrix]


def sign_flip(honest: Matrix, count: int, draw: np.random.Generator, strength: float = 10.0) -> Matrix:  # noqa: ARG001
    """Return the honest mean times a large negative factor."""
    return np.tile(-strength * honest.mean(axis=0), (count, 1))


def gaussian(honest: Matrix, count: int, draw: np.random.Generator, strength: float = 20.0) -> Matrix:
    """Return noise, `strength` times as long as the honest mean (Blanchard et al., arXiv 1703.02757)."""
    deviation = strength * np.linalg.norm(honest.mean(axis=0)) / np.sqrt(honest.shape[1])
    return deviation * draw.standard_normal((count, honest.shape[1]))


def ipm(honest: Matrix, count: int, draw: np.random.Generator, strength: float = 0.5) -> Matrix:  # noqa: ARG001
    """Return a small negative multiple of the honest mean (Xie et al., arXiv 1903.03936)."""
    return np.tile(-strength * honest.mean(axis=0), (count, 1))


def alie(honest: Matrix, count: int, draw: np.random.Generator, strength: float = 1.0) -> Matrix:  # noqa: ARG001
    """Return the honest mean moved by `strength` of the honest sites' deviations (Baruch et al., arXiv 1902.06156)."""
    return np.tile(honest.mean(axis=0) - strength * honest.std(axis=0), (count, 1))


COHORT_ATTACKS: dict[str, CohortAttack] = {
    "sign-flip": sign_flip,
    "gaussian": gaussian,
    "ipm": ipm,
    "alie": alie,
}
