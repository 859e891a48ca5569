"""Orthonormal bases of tall matrices.

Cholesky QR, done twice: with `L L^T = X^T X` the columns of `Y = X L^-T` are orthonormal but for an error that grows with
the square of X's condition number; a second step of the same kind leaves rounding error only (Yamamoto, Nakatsukasa,
Yanagisawa, Fukaya, "Roundoff Error Analysis of the CholeskyQR2 Algorithm", ETNA 44, 2015). It is all matrix products, which
makes it several times as fast as LAPACK's Householder QR. The triangle is inverted, since NumPy has no triangular solver
and its general one takes twice as long as inverse and product. What that loses grows with the condition number, which the
check of the first step bounds by some 2e6, so it stays below 1e-9 of the matrix.

Where the columns are too close to dependent for that, which the first step shows, Householder's QR takes over. Columns are
scaled to length 1 before, so that only their directions count, and columns of zeros, such as those of side factors that
are not in use yet, are left out.

Shape legend: N rows, C columns, M dimension of the basis, P columns to be restored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from strategies.lowrank.product import Matrix

_WIDE = 0.75
"""Share of columns to rows from which on a basis would save nothing."""

_NEARLY_ORTHONORMAL = 1e-3
"""Largest error of the first step that the second one is sure to repair."""


@dataclass(frozen=True)
class Span:
    """A matrix [N, C] in an orthonormal basis of what its columns span: `basis @ coordinates`.

    Norms, angles and products of columns are those of their coordinates.

    Attributes:
        coordinates: [M, C].
        factors: Matrices whose product is the basis [N, M]; none where that is the identity.
    """

    coordinates: Matrix
    factors: tuple[Matrix, ...]

    def restored(self, coordinates: Matrix) -> Matrix:
        """Return the columns [N, P] that have these coordinates [M, P]."""
        for factor in reversed(self.factors):
            coordinates = factor @ coordinates
        return coordinates


def span(columns: Matrix) -> Span:
    """Return a matrix [N, C] in an orthonormal basis, which is the identity where the matrix is not tall."""
    lengths = np.linalg.norm(columns, axis=0)
    used = lengths > 0
    if np.count_nonzero(used) >= _WIDE * len(columns):
        return Span(columns, ())
    unit = columns[:, used]
    unit /= lengths[used]
    factors, triangle = _by_cholesky(unit) or _by_householder(unit)
    coordinates = np.zeros((len(triangle), columns.shape[1]))
    coordinates[:, used] = triangle * lengths[used]
    return Span(coordinates, factors)


@dataclass(frozen=True)
class Frame:
    """Several matrices [N, *] in one orthonormal basis, by name.

    Attributes:
        basis: The basis.
        parts: Coordinates [M, *] of each.
    """

    basis: Span
    parts: Mapping[str, Matrix]

    def __getitem__(self, name: str) -> Matrix:
        return self.parts[name]

    def restored(self, coordinates: Matrix) -> Matrix:
        """Return the columns [N, P] that have these coordinates [M, P]."""
        return self.basis.restored(coordinates)


def frame(parts: Mapping[str, Matrix]) -> Frame:
    """Return matrices of one height in a basis of all their columns."""
    basis = span(np.hstack(list(parts.values())))
    stops = np.cumsum([part.shape[1] for part in parts.values()])
    return Frame(basis, dict(zip(parts, np.split(basis.coordinates, stops[:-1], axis=1), strict=True)))


def _by_cholesky(columns: Matrix) -> tuple[tuple[Matrix, ...], Matrix] | None:
    """Return the basis in factors and the coordinates [M, M], None where columns are too close to dependent."""
    try:
        first = np.linalg.cholesky(columns.T @ columns)
        nearly = columns @ np.linalg.inv(first).T
        gram = nearly.T @ nearly
        if not np.abs(gram - np.eye(len(gram))).max(initial=0.0) < _NEARLY_ORTHONORMAL:
            return None
        second = np.linalg.cholesky(gram)
    except np.linalg.LinAlgError:
        return None
    return (nearly, np.linalg.inv(second).T), second.T @ first.T


def _by_householder(columns: Matrix) -> tuple[tuple[Matrix, ...], Matrix]:
    basis, triangle = np.linalg.qr(columns)
    return (basis,), triangle
