"""What every aggregation of LoRA updates is measured against: the ideal product, multiplied out in plain float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Dense = NDArray[np.float64]


@dataclass(frozen=True)
class SiteFactors:
    """One site's trained layer: `weight` before normalisation, `scale` alpha/rank, b [O, R] and a [R, I] in float64."""

    weight: float
    scale: float
    b: Dense
    a: Dense


def ideal_update(sites: Sequence[SiteFactors]) -> Dense:
    """Return `sum_k p_k s_k B_k A_k` [O, I]."""
    whole = sum(site.weight for site in sites)
    update = np.zeros((sites[0].b.shape[0], sites[0].a.shape[1]))
    for site in sites:
        update += site.weight / whole * site.scale * (site.b @ site.a)
    return update


def relative_error(found: NDArray[np.floating], expected: Dense) -> float:
    """Return the Frobenius norm of the difference over that of what was expected."""
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected))


def drifted_sites(
    draw: np.random.Generator,
    ranks: Sequence[int],
    *,
    num_out: int = 256,
    num_in: int = 256,
    drift_b: float = 0.0,
    drift_a: float = 0.0,
    scale: float = 1.0,
) -> list[SiteFactors]:
    """Draw sites that start from the same factors and drift apart by a share of their norms; equal weights.

    A site of rank r holds the first r components of the common ones.
    """
    b0, a0 = draw.standard_normal((num_out, max(ranks))), draw.standard_normal((max(ranks), num_in))
    return [
        SiteFactors(
            1.0,
            scale,
            b0[:, :rank] + drift_b * draw.standard_normal((num_out, rank)),
            a0[:rank] + drift_a * draw.standard_normal((rank, num_in)),
        )
        for rank in ranks
    ]


def padded(site: SiteFactors, rank: int) -> SiteFactors:
    """Return factors filled up with zeros to a rank; the product stays the same."""
    missing = rank - site.b.shape[1]
    b, a = np.pad(site.b, ((0, 0), (0, missing))), np.pad(site.a, ((0, missing), (0, 0)))
    return SiteFactors(site.weight, site.scale, b, a)
