"""The singular values of a product, from its factors: the one kernel of truncation, recompression and redistribution.

With `Q_L R_L = qr(left)`, `Q_R R_R = qr(right^T)` (:mod:`strategies.lowrank.span`) and the small
`U S V^T = svd(R_L R_R^T)`, the product's own singular value decomposition is `(Q_L U) S (Q_R V)^T`. Nothing of size [O, I]
is formed: for O = I = 4096 and a summed rank of 512 this takes half a second, a dense decomposition half a minute
(`python -m benchmarks.aggregation`). It is the kernel of FLoRIST (arXiv 2506.09199, which writes it with two more
decompositions) and gives what FlexLoRA (arXiv 2402.11505) computes densely.

Where we differ from FLoRIST: singular values are split evenly over both factors (`sqrt(S)` each), which keeps the factors'
rounding errors and gradients of one size; FLoRIST puts all of them into B.

The best approximation of rank p keeps the first p values (Eckart and Young), and its relative error is exactly
`sqrt(1 - kept energy)`, where the energy is the sum of squared values.

Shape legend: O out, I in, R rank of the product's factors, P singular values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from strategies.lowrank.product import Matrix, Product, nothing
from strategies.lowrank.span import span


@dataclass(frozen=True)
class Spectrum:
    """A product's singular value decomposition, without values that are zero but for rounding.

    Attributes:
        left: Orthonormal columns, [O, P].
        values: Positive and falling, [P].
        right: Orthonormal rows, [P, I].
    """

    left: Matrix
    values: Matrix
    right: Matrix

    @property
    def rank(self) -> int:
        """P: the product's numerical rank."""
        return len(self.values)

    @property
    def norm(self) -> float:
        """Frobenius norm of the product."""
        return float(np.sqrt(np.sum(self.values**2)))

    def discarded(self, rank: int) -> float:
        """Return the share of the energy that the best approximation of this rank leaves out, in [0, 1]."""
        energy = self.values**2
        return float(energy[rank:].sum() / energy.sum()) if rank < self.rank else 0.0

    def rank_for(self, threshold: float) -> int:
        """Return the smallest rank that keeps at least this share of the energy, in (0, 1]."""
        kept = 1.0 - np.array([self.discarded(rank) for rank in range(1, self.rank)])
        return min(self.rank, 1 + int(np.sum(kept < threshold)))

    def part(self, start: int, stop: int) -> Product:
        """Return the product of the values from `start` to before `stop`, split evenly over both factors."""
        root = np.sqrt(self.values[start:stop])
        return Product(self.left[:, start:stop] * root, root[:, None] * self.right[start:stop])


def norm_of(term: Product) -> float:
    """Return a product's Frobenius norm without a decomposition, to full precision also where terms cancel."""
    left, right = span(term.left), span(term.right.T)
    return float(np.linalg.norm(left.coordinates @ right.coordinates.T))


def spectrum(term: Product) -> Spectrum:
    """Decompose a product."""
    left, right = span(term.left), span(term.right.T)
    u, values, v = np.linalg.svd(left.coordinates @ right.coordinates.T, full_matrices=False)
    count = _numerical_rank(values, term)
    columns, rows = left.restored(u[:, :count]), right.restored(v[:count].T).T
    sign = _signs(rows)
    return Spectrum(columns * sign, values[:count], sign[:, None] * rows)


def _numerical_rank(values: Matrix, term: Product) -> int:
    """Count the values above the rounding error of the product's own size."""
    size = np.linalg.norm(term.left) * np.linalg.norm(term.right) if term.rank else 0.0
    return int(np.sum(values > np.finfo(np.float64).eps * size))


def _signs(rows: Matrix) -> Matrix:
    """Return +-1 for each row, such that its largest entry becomes positive: the decomposition leaves the sign open."""
    if not rows.size:
        return np.ones(len(rows))
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.where(largest < 0, -1.0, 1.0)


@dataclass(frozen=True)
class Recompressed:
    """A product at a bounded rank.

    Attributes:
        kept: The best approximation.
        discarded_energy: Squared Frobenius norm of what was left out.
        energy: Squared Frobenius norm of the whole.
    """

    kept: Product
    discarded_energy: float
    energy: float


def recompress(term: Product, max_rank: int) -> Recompressed:
    """Return the best approximation of rank at most `max_rank`; it is the product itself where its rank allows it."""
    if not max_rank:
        energy = norm_of(term) ** 2
        return Recompressed(nothing(term.shape), energy, energy)
    whole = spectrum(term)
    energy = whole.norm**2
    return Recompressed(whole.part(0, min(max_rank, whole.rank)), whole.discarded(max_rank) * energy, energy)
