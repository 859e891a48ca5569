"""Products of two thin matrices that are added, scaled and measured without being multiplied out.

What a LoRA layer adds to its weight is `s B A`, with `s = alpha / r` or `alpha / sqrt(r)`. Sites differ in rank and in
alpha, so a sum over sites is a sum of such products *with their scales inside*; averaging factors first is another thing.
Side by side, factors of several products make one product of larger rank:
`sum_k w_k B_k A_k = [w_1 B_1 | ... | w_K B_K] [A_1; ...; A_K]`.

All numbers are float64. Shape legend: O out, I in, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Product:
    """The matrix `left @ right` [O, I], held as its factors.

    Attributes:
        left: [O, R], with the scale in it.
        right: [R, I].
    """

    left: Matrix
    right: Matrix

    def __post_init__(self) -> None:
        assert self.left.ndim == self.right.ndim == 2, "factors are matrices"
        assert self.left.shape[1] == self.right.shape[0], f"{self.left.shape} times {self.right.shape}"

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """Columns of the left factor: a bound on the matrix's rank."""
        return int(self.left.shape[1])

    @property
    def norm(self) -> float:
        """Frobenius norm, as `sqrt(tr((L^T L)(R R^T)))`.

        It squares what it sums, so where terms of a sum cancel, half of the digits are lost;
        :func:`strategies.lowrank.spectrum.norm_of` does not.
        """
        return float(np.sqrt(max(0.0, np.sum((self.left.T @ self.left) * (self.right @ self.right.T)))))

    def scaled(self, factor: float) -> Product:
        """Return `factor` times the product."""
        return Product(factor * self.left, self.right)


def product(b: NDArray[np.floating], a: NDArray[np.floating], scale: float = 1.0) -> Product:
    """Return `scale * b @ a` of a LoRA layer's factors, in float64.

    Args:
        b: [O, R].
        a: [R, I].
        scale: alpha/rank, or alpha/sqrt(rank).
    """
    return Product(scale * np.asarray(b, np.float64), np.asarray(a, np.float64))


def nothing(shape: tuple[int, int]) -> Product:
    """Return the zero matrix, of rank 0."""
    return Product(np.zeros((shape[0], 0)), np.zeros((0, shape[1])))


def total(terms: Sequence[Product]) -> Product:
    """Return the sum of products of one shape, exactly; its rank is the sum of theirs.

    FLoRA's stacking (Wang et al., NeurIPS 2024, arXiv 2409.05976) with weights and scales in the left factors.
    """
    assert terms, "a sum needs a term to know its shape"
    return Product(np.hstack([term.left for term in terms]), np.vstack([term.right for term in terms]))


def difference(one: Product, other: Product) -> Product:
    """Return `one - other`, exactly."""
    return total([one, other.scaled(-1.0)])
