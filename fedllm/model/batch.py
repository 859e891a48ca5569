"""Token sequences as tensors, and the logits at their targets.

Examples packed into one sequence must not see each other: positions restart in each, and attention stays inside it. Three
arrangements do that:

- ``mask``: one row per sequence, padded on the right, with a block-diagonal causal mask [B, 1, L, L]. Without packing no
  mask is needed: attention is causal, and padding comes last.
- ``positions``: the same rows without a mask, for architectures whose layers differ in what they attend to (sliding
  windows). transformers makes each layer's mask itself from positions that restart.
- ``flat``: all sequences in one row, without padding, for kernels that take lengths instead of masks (FlashAttention).

Shape legend: B sequences, L tokens of the longest one, T targets, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedllm.data.sequences import Sequence
from fedllm.errors import DataError, explain

Arrangement = Literal["mask", "positions", "flat"]

_PADDING = 0
"""Segment id of padding; also the token there, which nobody attends to and which predicts nothing."""


@dataclass(frozen=True)
class Batch:
    """Sequences ready for a model.

    Attributes:
        input_ids: int64 [B, L].
        position_ids: int64 [B, L], from 0 in each segment.
        attention_mask: [B, 1, L, L], bool (True: attends) or additive float; None where causal attention is enough.
        target_rows: int64 [T], row of each target.
        target_columns: int64 [T], column of the token that *predicts* it, one before its own.
        targets: int64 [T], the token to predict.
        num_tokens: Tokens without padding.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    target_rows: torch.Tensor
    target_columns: torch.Tensor
    targets: torch.Tensor
    num_tokens: int


def arrangement_for(model: nn.Module) -> Arrangement:
    """Choose the arrangement that a model's attention can work with."""
    config: Any = model.config
    if str(config._attn_implementation).startswith("flash"):
        return "flat"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return "mask" if kinds == {"full_attention"} and not getattr(config, "sliding_window", None) else "positions"


def collate(sequences: Iterable[Sequence], model: nn.Module, arrangement: Arrangement | None = None) -> Batch:
    """Put sequences together as a model wants them.

    Args:
        sequences: At least one.
        model: Its attention and device decide the form.
        arrangement: Another one than :func:`arrangement_for` chooses.

    Raises:
        DataError: There is none, or the first token of a segment is a target (nothing could predict it).
    """
    rows = list(sequences)
    _check(rows)
    arrangement = arrangement or arrangement_for(model)
    rows = [_joined(rows)] if arrangement == "flat" else rows
    segments = _padded([row.segment_ids for row in rows])  # [B, L]
    is_target = _padded([row.target_mask for row in rows]).astype(bool)  # [B, L]
    ids = _padded([row.input_ids for row in rows]).astype(np.int64)  # [B, L]
    target_rows, columns = np.nonzero(is_target)
    mask = _mask(segments, model) if arrangement == "mask" and segments.max(initial=0) > 1 else None
    device = next(model.parameters()).device
    to_device = [ids, _positions(segments), target_rows, columns - 1, ids[target_rows, columns]]
    tensors = [torch.from_numpy(array).to(device) for array in to_device]
    return Batch(
        input_ids=tensors[0],
        position_ids=tensors[1],
        attention_mask=None if mask is None else mask.to(device),
        target_rows=tensors[2],
        target_columns=tensors[3],
        targets=tensors[4],
        num_tokens=sum(map(len, rows)),
    )


def target_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the logits [T, V] that predict the batch's targets, and compute no others.

    The output head is most of a small model's work and of a large vocabulary's memory, so only the hidden states that
    predict a target reach it. A hook on the head picks them, which works for every architecture and keeps what it does to
    its logits (scaling, soft caps).
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]

    def pick(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *others = arguments  # [B, L, H]
        return (hidden[batch.target_rows, batch.target_columns], *others)

    handle = head.register_forward_pre_hook(pick)
    try:
        output = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        )
    finally:
        handle.remove()
    logits: torch.Tensor = output.logits
    return logits


def _check(rows: list[Sequence]) -> None:
    if not rows:
        raise DataError(explain("a batch is empty", expected="at least one sequence"))
    for row in rows:
        starts = np.diff(row.segment_ids, prepend=_PADDING) != 0
        if (row.target_mask & starts).any():
            raise DataError(explain("the first token of a segment is a target; nothing predicts it"))


def _joined(rows: list[Sequence]) -> Sequence:
    """Put all rows into one, with a segment id of its own for every segment."""
    offsets = np.cumsum([0, *(row.segment_ids.max(initial=0) for row in rows[:-1])])
    return Sequence(
        np.concatenate([row.input_ids for row in rows]),
        np.concatenate([row.target_mask for row in rows]),
        np.concatenate([row.segment_ids + offset for row, offset in zip(rows, offsets, strict=True)]),
    )


def _padded(rows: list[NDArray[Any]]) -> NDArray[Any]:
    table = np.full((len(rows), max(map(len, rows))), _PADDING, rows[0].dtype)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table


def _positions(segments: NDArray[np.int32]) -> NDArray[np.int64]:
    """Count from 0 in each segment; padding counts as a segment."""
    columns = np.arange(segments.shape[1])
    starts = np.diff(segments, prepend=-1) != 0  # [B, L]
    return columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)


def _mask(segments: NDArray[np.int32], model: nn.Module) -> torch.Tensor:
    """Return who attends to whom: earlier tokens (and itself) of the same segment."""
    same = torch.from_numpy(segments[:, :, None] == segments[:, None, :])
    mask = same.tril()[:, None]  # [B, 1, L, L]
    if model.config._attn_implementation == "sdpa":  # type: ignore[union-attr]
        return mask
    dtype: torch.dtype = model.dtype  # type: ignore[assignment]
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
