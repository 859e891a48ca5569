"""Factors of unequal ranks padded with zeros to one rank: the baseline that product rules are measured against.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models" (HetLoRA), EMNLP 2024, arXiv
2401.06432: factors are padded to the largest rank, averaged with weights, and cut to each site's rank. A component that
only the share f of the weight holds counts f in both factors, so f^2 in the product where f is right: with ranks
[4, 4, 8, 8, 16, 16, 32, 64] that alone is 40 % error.

HetLoRA weighs sites by the norm of their product, `p_k = |B_k A_k| / sum_j |B_j A_j|`, in place of their examples. Where
we differ: its local regulariser and self-pruning are not here, so a site's rank stays what it chose.

Shape legend: O out, I in, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from strategies.lowrank.product import Matrix, Product


def pad(b: Matrix, a: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    """Return factors [O, R'] and [R', I] filled up with zeros to `rank`; the product stays the same."""
    missing = rank - b.shape[1]
    assert missing >= 0, "padding never cuts"
    return np.pad(b, ((0, 0), (0, missing))), np.pad(a, ((0, missing), (0, 0)))


def norm_weights(products: Sequence[Product]) -> list[float]:
    """Return HetLoRA's weights: each product's share of the summed norms, equal shares where all are zero."""
    norms = [one.norm for one in products]
    whole = sum(norms)
    return [norm / whole for norm in norms] if whole else [1.0 / len(norms)] * len(norms)
