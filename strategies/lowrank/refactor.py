"""A product's factors chosen anew so that A has orthonormal rows: FedSVD.

Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", NeurIPS 2025, arXiv 2505.12805.

`B A = (B Q)(Q^T A)` for every orthogonal Q, so factors can be chosen: `(U S)(V^T)` keeps the gradients of B well
conditioned where sites train B alone. It does not enlarge the space: the rows of every later A stay in the row space of
the first one.

Shape legend: O out, I in, R rank.
"""

from __future__ import annotations

import numpy as np

from strategies.lowrank.product import Matrix, Product
from strategies.lowrank.spectrum import spectrum


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
