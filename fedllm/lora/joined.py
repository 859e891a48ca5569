"""A federation's adapter as one LoRA adapter that computes the same: what is exported.

`s B A + side_B side_A = [s B | side_B] [A; side_A]`, so the trained and the side factors side by side are an adapter of
rank R + S and scale 1. Side components that hold nothing in any layer are left away. Matrices between the factors are
multiplied into B.

Shape legend: R the federation's rank, S rank of the side factors.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedllm.lora.heads import multiplied_out
from fedllm.lora.pairs import Pair, pairs_of, with_rank
from fedllm.model.spec import LoraSpec
from fedllm.update import Arrays, Layout


def joined(adapter: LoraSpec, layout: Layout, arrays: Arrays) -> tuple[LoraSpec, Layout, Arrays]:
    """Return spec, layout and values of the one adapter; without side factors and heads, those given.

    Args:
        adapter: The federation's.
        layout: Its layout.
        arrays: Its values.
    """
    if adapter.num_heads:
        return adapter.model_copy(update={"num_heads": 0}), *multiplied_out(layout, arrays)
    pairs = pairs_of(layout)
    if not any(pair.side_rank for pair in pairs):
        return adapter, layout, arrays
    rank = adapter.rank + max(_used(pair, arrays) for pair in pairs)
    values: Arrays = {}
    for pair in pairs:
        values[pair.a.name] = _filled(np.vstack([arrays[pair.a.name], arrays[pair.side_a]]), rank)
        b = np.hstack([np.float64(adapter.scale) * arrays[pair.b.name], arrays[pair.side_b]])
        values[pair.b.name] = _filled(b.T, rank).T.copy()
    plain = {"rank": rank, "alpha": float(rank), "rslora": False, "min_rank": 0, "side_rank": 0}
    one = with_rank(layout, rank)
    return adapter.model_copy(update=plain), one, {name: values[name] for name in one.names}


def _used(pair: Pair, arrays: Arrays) -> int:
    """Return how many leading side components hold something."""
    holds = np.any(arrays[pair.side_b], axis=0) & np.any(arrays[pair.side_a], axis=1)
    return int(np.flatnonzero(holds)[-1]) + 1 if holds.any() else 0


def _filled(rows: NDArray[np.floating], rank: int) -> NDArray[np.float32]:
    """Return the first rows, or zeros after them, as float32."""
    wide = np.zeros((rank, rows.shape[1]), np.float32)
    wide[: len(rows)] = rows[:rank]
    return wide
