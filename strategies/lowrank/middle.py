"""A small square matrix between two fixed factors: `W = W0 + s B M A` with only M [R, R] trained and sent.

With B and A fixed, the update is linear in M, so the mean of the M is the mean of the products: exact, R^2 numbers a
layer, whatever the layer's size.

- **Fed-SB** (Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
  Federated LoRA Fine-Tuning", TMLR 2026, arXiv 2502.15436): B and A are orthonormal, from the singular vectors of an
  approximate first step of full fine-tuning, and M starts with its singular values. Whatever that step was computed from
  is outside the privacy of the later rounds: take public data, a step with noise, or RAVAN's random factors.
- **RAVAN** (Raje et al., "Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning", NeurIPS 2025, arXiv
  2506.05568): several heads `sum_h s_h B_h M_h A_h` with random orthonormal factors; sites also train the
  scales, and the server folds them in: `M_h <- sum_k p_k s_kh M_kh`, `s_h <- 1`.

Shape legend: O out, I in, R rank, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from strategies.lowrank.product import Matrix, Product
from strategies.lowrank.spectrum import spectrum


def fixed_factors(step: Product, rank: int) -> tuple[Matrix, Matrix, Matrix]:
    """Return Fed-SB's orthonormal B [O, R], first M [R, R] and orthonormal A [R, I] of a first step.

    Args:
        step: The first step; its rank is at least `rank`.
        rank: R.
    """
    whole = spectrum(step)
    assert whole.rank >= rank, "the first step has too small a rank"
    return whole.left[:, :rank], np.diag(whole.values[:rank]), whole.right[:rank]


def random_factors(draw: np.random.Generator, num_out: int, num_in: int, rank: int) -> tuple[Matrix, Matrix]:
    """Draw RAVAN's fixed factors of one head: orthonormal columns B [O, R], orthonormal rows A [R, I]."""
    left, _ = np.linalg.qr(draw.standard_normal((num_out, rank)))
    right, _ = np.linalg.qr(draw.standard_normal((num_in, rank)))
    return left, right.T


def mean_middle(weights: Sequence[float], middles: Sequence[Matrix], scales: Sequence[float] | None = None) -> Matrix:
    """Return `sum_k p_k s_k M_k` [R, R] with `p` the normalised weights: the exact aggregate of one head.

    Args:
        weights: Aggregation weights before normalisation.
        middles: The sites' M [R, R].
        scales: The sites' trained scales (RAVAN), None for 1 (Fed-SB).
    """
    whole = sum(weights)
    factors = [1.0] * len(middles) if scales is None else scales
    terms = [weight / whole * scale * m for weight, scale, m in zip(weights, factors, middles, strict=True)]
    return np.asarray(np.sum(terms, axis=0))


def middle_product(b: Matrix, middle: Matrix, a: Matrix, scale: float = 1.0) -> Product:
    """Return `scale * b @ middle @ a` in factored form."""
    return Product(scale * b @ middle, a)
