"""Adapters with square matrices between their factors, `s B M A`: multiplied out, they are plain LoRA.

Two kinds, told apart by their tensors' roles, since they start differently (:mod:`fedllm.model.initial`):

- one matrix a layer, roles `lora_A`, `lora_B`, `lora_M` [1, R, R]: B = 0 and M = 1, a LoRA adapter until B, M and A are
  chosen otherwise (Fed-SB);
- several heads, roles `head_A`, `head_B`, `head_M` [H, r, r]: B and A are drawn and stay, M = 0 (Ravan).

Shape legend: O out, I in, R = H r, H heads, r rank of a head.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedllm.update import Arrays, Layout, TensorSpec

MIDDLES = ("lora_M", "head_M")


def middle_name(layer: str) -> str:
    """Return the name of a layer's matrices."""
    return f"{layer}.lora_M.weight"


def multiplied_out(layout: Layout, arrays: Arrays) -> tuple[Layout, Arrays]:
    """Return layout and values of the LoRA adapter that computes the same: B M in place of B."""
    kept = [spec for spec in layout.tensors if spec.role not in MIDDLES]
    plain = Layout(
        tuple(TensorSpec(one.name, one.shape, one.dtype, one.role.replace("head_", "lora_")) for one in kept)
    )
    values = {name: arrays[name] for name in plain.names}
    for spec in layout.tensors:
        if spec.role in MIDDLES:
            name = spec.name.replace(".lora_M.", ".lora_B.")
            values[name] = np.asarray(arrays[name].astype(np.float64) @ block_diagonal(arrays[spec.name]), np.float32)
    return plain, values


def block_diagonal(middle: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the heads' matrices [H, r, r] as one [R, R]."""
    num_heads, rank, _ = middle.shape
    whole = np.zeros((num_heads, rank, num_heads, rank))
    heads = np.arange(num_heads)
    whole[heads, :, heads, :] = middle
    return whole.reshape(num_heads * rank, num_heads * rank)
