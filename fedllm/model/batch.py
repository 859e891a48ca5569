"""Token sequences as tensors: padded, with a mask that keeps packed examples apart.

Shape legend: N sequences, L tokens in the longest of them, T targets over all of them, H width of the model.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from fedllm.data.sequences import Sequence


@dataclass(frozen=True)
class Batch:
    """Several sequences, ready for a model.

    Attributes:
        input_ids: int64 [N, L], 0 where a sequence is shorter.
        position_ids: int64 [N, L], restarting at 0 in every segment.
        attention_mask: bool [N, 1, L, L], True where a token may look; None if all sequences are whole and unpacked, where
            the model's own causal mask says the same and is faster.
        sources: int64 [T], flat indices into [N, L] of the tokens whose successor is a target.
        targets: int64 [T], those successors.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    sources: torch.Tensor
    targets: torch.Tensor

    @property
    def num_targets(self) -> int:
        """Tokens that count in the loss."""
        return len(self.targets)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        mask = self.attention_mask
        return Batch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            mask.to(device) if mask is not None else None,
            self.sources.to(device),
            self.targets.to(device),
        )


def collate(sequences: Several[Sequence]) -> Batch:
    """Turn sequences into a batch."""
    shape = (len(sequences), max(len(sequence) for sequence in sequences))
    ids, targets = np.zeros(shape, np.int64), np.zeros(shape, bool)
    segments, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, sequence in enumerate(sequences):
        size = len(sequence)
        ids[row, :size], targets[row, :size] = sequence.input_ids, sequence.target_mask
        segments[row, :size] = sequence.segment_ids
        positions[row, :size] = _positions(sequence.segment_ids)
    sources = np.flatnonzero(targets) - 1
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        _mask(segments),
        torch.from_numpy(sources),
        torch.from_numpy(ids.reshape(-1)[sources + 1]),
    )


def _positions(segment_ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Count from 0 within each run of equal segment ids."""
    index = np.arange(len(segment_ids))
    starts = np.flatnonzero(np.r_[True, segment_ids[1:] != segment_ids[:-1]])
    return np.asarray(index - np.repeat(starts, np.diff(np.r_[starts, len(segment_ids)])))


def _mask(segments: np.ndarray[Any, Any]) -> torch.Tensor | None:
    """Return who may look at whom: earlier tokens of the same segment. Padding looks at itself, so that no row is empty."""
    if (segments == 1).all():
        return None
    same = segments[:, None, :, None] == segments[:, None, None, :]
    size = segments.shape[1]
    return torch.from_numpy(same & np.tri(size, dtype=bool))


def target_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Return the logits that predict the targets, float32 [T, vocabulary]; no others are computed.

    Args:
        model: A causal language model of transformers, or PEFT's wrapper around one.
        batch: On the model's device.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.get_decoder()(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    chosen = hidden.reshape(-1, hidden.shape[-1])[batch.sources]
    logits: torch.Tensor = base.get_output_embeddings()(chosen)
    return logits.float()


def loss_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy summed over targets, in nats."""
    return functional.cross_entropy(logits, targets, reduction="sum")
