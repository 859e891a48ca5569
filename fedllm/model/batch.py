"""Token sequences as tensors, and the logits at their targets.

Examples packed into one sequence must not see each other: positions restart in each, and attention stays inside it. Three
arrangements do that:

- ``mask``: one row per sequence, padded on the right, with a block-diagonal causal mask [B, 1, L, L]. Without packing no
  mask is needed: attention is causal, and padding comes last.
- ``positions``: the same rows without a mask, for architectures whose layers differ in what they attend to (sliding
  windows). transformers makes each layer's mask itself from positions that restart.
- ``flat``: all sequences in one row, without padding, for kernels that take lengths instead of masks (FlashAttention).

A soft prompt comes before every example, packed or not: a prompt has places in the sequence, before each example; a prefix
is in the cache, where all examples of a row share it. A cache goes with the first arrangement only, so under the others
examples with a prefix are unpacked into rows.

Shape legend: B sequences, L tokens of the longest one (a prompt's places included), T targets, V vocabulary, H hidden size.
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
from fedllm.model.prompts.forward import cached, embeddings, num_virtual_tokens
from fedllm.model.prompts.places import REAL, unpacked, with_places

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
        num_tokens: Tokens without padding and without virtual ones.
        virtual: int64 [B, L], number of the virtual token at a place, -1 where there is a real one; None without a prompt.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    target_rows: torch.Tensor
    target_columns: torch.Tensor
    targets: torch.Tensor
    num_tokens: int
    virtual: torch.Tensor | None = None


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
    num_tokens = sum(map(len, rows))
    arrangement = arrangement or arrangement_for(model)
    num_places, num_cached = num_virtual_tokens(model)
    if num_cached and arrangement != "mask":
        rows, arrangement = [part for row in rows for part in unpacked(row)], "mask"
    rows = [_joined(rows)] if arrangement == "flat" else rows
    rows, virtual = _with_prompts(rows, num_places)
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
        num_tokens=num_tokens,
        virtual=None if virtual is None else torch.from_numpy(virtual).to(device),
    )


def target_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the logits [T, V] that predict the batch's targets, and compute no others.

    The output head is most of a small model's work and of a large vocabulary's memory, so only the hidden states that
    predict a target reach it. A hook on the head picks them, which works for every architecture and keeps what it does to
    its logits (scaling, soft caps).
    """
    return _at(model, batch, batch.target_rows, batch.target_columns)[0]


def hidden_at(model: nn.Module, batch: Batch, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the last layer's hidden states [N, H], as the output head gets them, at N places [N], [N] of a batch."""
    return _at(model, batch, rows, columns)[1]


def _at(model: nn.Module, batch: Batch, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    picked: list[torch.Tensor] = []

    def pick(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *others = arguments  # [B, L, H]
        picked.append(hidden[rows, columns])
        return (picked[0], *others)

    handle = head.register_forward_pre_hook(pick)
    try:
        output = _forward(model, batch)
    finally:
        handle.remove()
    return output.logits, picked[0]


def _forward(model: Any, batch: Batch) -> Any:
    """Call the model, and where it has a soft prompt, its base with the virtual tokens in their places."""
    _, num_cached = num_virtual_tokens(model)
    ids, positions, mask = batch.input_ids, batch.position_ids, batch.attention_mask
    if batch.virtual is not None:
        inputs = {"inputs_embeds": embeddings(model, ids, batch.virtual)}
        return model.get_base_model()(**inputs, position_ids=positions, attention_mask=mask, use_cache=False)
    if num_cached:
        return model.get_base_model()(input_ids=ids, **cached(model, positions, mask, num_cached), use_cache=False)
    return model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)


def _with_prompts(rows: list[Sequence], num_places: int) -> tuple[list[Sequence], NDArray[np.int64] | None]:
    if not num_places:
        return rows, None
    longer, virtual = zip(*(with_places(row, num_places) for row in rows), strict=True)
    return list(longer), _padded(list(virtual), REAL)


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


def _padded(rows: list[NDArray[Any]], filler: int = _PADDING) -> NDArray[Any]:
    table = np.full((len(rows), max(map(len, rows))), filler, rows[0].dtype)
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
