"""The freedom of a product's factors, `B A = (B Q)(Q^T A)` for every orthogonal Q, and rules that use it.

Sites that learn the same product in different gauges have factors whose mean means nothing. Two remedies:

- *alignment* (FedRot-LoRA, arXiv 2602.23638): turn a site's factors towards the last global ones before averaging, by the
  orthogonal Procrustes problem; the product stays the same and the cross terms of the average shrink;
- *re-factoring* (Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", NeurIPS 2025,
  arXiv 2505.12805): the global product as `(U S)(V^T)`, so that A has orthonormal rows when sites train B alone. It does
  not enlarge the space: the rows of every later A stay in the row space of the first one.

Shape legend: O out, I in, R rank.
"""

from __future__ import annotations

import numpy as np

from strategies.lowrank.product import Matrix, Product
from strategies.lowrank.spectrum import spectrum


def align(b: Matrix, a: Matrix, reference: Matrix, strength: float = 1.0) -> tuple[Matrix, Matrix]:
    """Turn factors so that A comes as close to a reference A [R, I] as an orthogonal turn can bring it.

    Args:
        b: [O, R].
        a: [R, I].
        reference: [R, I].
        strength: Share of the turn that is made, in [0, 1]: the orthogonal matrix next to `(1 - strength) I + strength Q`.
    """
    turn = _nearest_orthogonal(a @ reference.T)
    if strength < 1.0:
        turn = _nearest_orthogonal((1 - strength) * np.eye(len(turn)) + strength * turn)
    return b @ turn, turn.T @ a


def refactor(term: Product, rank: int) -> tuple[Matrix, Matrix]:
    """Return `U S` [O, R] and `V^T` [R, I] of the product's largest values; rows of the second are orthonormal.

    Where the product has a smaller rank, the second is completed by an orthonormal basis of the rest of the product's own
    row factor, so that it keeps spanning what it spanned.
    """
    whole = spectrum(term)
    kept = min(rank, whole.rank)
    left = np.zeros((term.shape[0], rank))
    left[:, :kept] = whole.left[:, :kept] * whole.values[:kept]
    return left, _completed(whole.right[:kept], term.right, rank)


def _completed(rows: Matrix, spanning: Matrix, rank: int) -> Matrix:
    """Add orthonormal rows out of `spanning` until there are `rank` of them."""
    missing = rank - len(rows)
    if not missing:
        return rows
    rest = spanning - (spanning @ rows.T) @ rows
    _, _, basis = np.linalg.svd(rest, full_matrices=False)
    assert len(basis) >= missing, "the row factor has at least as many rows as the rank"
    return np.vstack([rows, basis[:missing]])


def _nearest_orthogonal(matrix: Matrix) -> Matrix:
    """Return the orthogonal factor of the polar decomposition."""
    u, _, v = np.linalg.svd(matrix)
    nearest: Matrix = u @ v
    return nearest
