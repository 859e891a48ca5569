"""The core decomposition of a summed product against a dense one of the same product, in the same run."""

from __future__ import annotations

import math
import time

import numpy as np

from benchmarks.aggregation.adapter import SIZE
from benchmarks.common import median_seconds
from fedllm import rng
from strategies.lowrank.product import Matrix, Product, product, total
from strategies.lowrank.spectrum import spectrum


def measure(side: int, num_sites: int, rank: int, repeats: int) -> dict[str, object]:
    """Decompose `sum_k p_k s_k B_k A_k` of one layer in both ways.

    Args:
        side: Rows and columns of the layer.
        num_sites: K.
        rank: Of every site.
        repeats: How often the core way is timed; the dense one is timed once, multiplying out included.
    """
    whole = summed(side, num_sites, rank)
    core_s = median_seconds(lambda: spectrum(whole), repeats)
    started = time.perf_counter()
    u, values, v = np.linalg.svd(whole.left @ whole.right, full_matrices=False)
    dense_s = time.perf_counter() - started
    found = spectrum(whole)
    return {
        "core_svd_speedup_vs_dense": dense_s / core_s,
        "core_svd_seconds": core_s,
        "dense_svd_seconds": dense_s,
        "core_svd_largest_value_error": float(np.abs(found.values - values[: found.rank]).max() / values[0]),
        "core_svd_top_product_error": _error(found.part(0, rank), u[:, :rank] * values[:rank], v[:rank]),
        "core_svd_shape": [side, side, num_sites * rank],
    }


def summed(side: int, num_sites: int, rank: int) -> Product:
    """Draw the sum of the sites' products as one product of rank K R."""
    draw = rng.generator(0, purpose="benchmark kernel")
    terms = []
    for _ in range(num_sites):
        b, a = draw.standard_normal((side, rank)), draw.standard_normal((rank, side))
        terms.append(product(SIZE * b, SIZE * a, 2.0 / num_sites))
    return total(terms)


def _error(found: Product, left: Matrix, right: Matrix) -> float:
    """Return the relative Frobenius distance of a product to another."""
    gap = found.left @ found.right - left @ right
    return float(np.linalg.norm(gap) / math.sqrt(np.sum(left**2)))
