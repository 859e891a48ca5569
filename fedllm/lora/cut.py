"""A site's cut of the federation's adapter: as many components as it can train, in its own scale.

The federation's adapter has rank R and scale s. A site with less memory trains its first r components, with its own scale
`s_k`, and applies the others and the side factors as they are, so every site applies the very same product:

    s B A + side = s_k B_k A_k + rest
    B_k = (s / s_k) B[:, :r],   A_k = A[:r]                what the site trains
    rest = s B[:, r:] A[r:] + side_B side_A                what it holds still, in one frozen adapter of scale 1

A component of B and A stays where it is; strategies that re-factor put the largest ones first. What the site changed is
said in the federation's coordinates, `dB = (s_k / s) dB_k`, `dA = dA_k`: then `s (B + dB)(A + dA) + side` is what the site
applies after training, and its scale is inside the product for every rule that follows. An update travels narrowed to the
site's rank, since the rest of it is zero.

Shape legend: O out, I in, R the federation's rank, r the site's, S rank of the side factors.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedllm.lora.pairs import TRAINED, Pair, pairs_of
from fedllm.update import Arrays, Layout, TensorSpec

Factors = tuple[NDArray[np.float32], NDArray[np.float32]]
"""(B, A) of one layer."""


def narrowed(layout: Layout, rank: int) -> Layout:
    """Return the layout with its trained factors narrowed to a site's rank; other tensors stay as they are."""
    return Layout(tuple(_narrowed(spec, rank) for spec in layout.tensors))


def narrow(arrays: Arrays, layout: Layout, rank: int) -> Arrays:
    """Return a site's components of some tensors, in the shapes of :func:`narrowed`.

    Args:
        arrays: At least the layout's.
        layout: The tensors, in the federation's shapes.
        rank: r.
    """
    return {spec.name: arrays[spec.name][own_components(spec, rank)] for spec in layout.tensors}


def own_components(spec: TensorSpec, rank: int) -> tuple[slice, ...]:
    """Return where a site's components are in one of the federation's tensors."""
    if spec.role not in TRAINED:
        return (slice(None),)
    return (slice(rank), slice(None)) if spec.role == "lora_A" else (slice(None), slice(rank))


def rest_of(pair: Pair, arrays: Arrays, rank: int, scale: float) -> Factors:
    """Return what a site holds still at a layer: B [O, R - r + S] and A [R - r + S, I] of scale 1.

    Args:
        pair: The layer.
        arrays: The federation's adapter.
        rank: r.
        scale: s.
    """
    b = np.asarray(scale * arrays[pair.b.name][:, rank:].astype(np.float64), np.float32)
    a = arrays[pair.a.name][rank:]
    if not pair.side_rank:
        return b, a
    return np.hstack([b, arrays[pair.side_b]]), np.vstack([a, arrays[pair.side_a]])


def rest_ranks(layout: Layout, rank: int) -> dict[str, int]:
    """Return R - r + S by layer for a site of rank r: how large its frozen adapter is."""
    return {pair.layer: pair.rank - rank + pair.side_rank for pair in pairs_of(layout)}


def _narrowed(spec: TensorSpec, rank: int) -> TensorSpec:
    if spec.role not in TRAINED:
        return spec
    shape = (rank, spec.shape[1]) if spec.role == "lora_A" else (spec.shape[0], rank)
    return TensorSpec(spec.name, shape, spec.dtype, spec.role)
