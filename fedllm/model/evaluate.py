"""Loss, perplexity and accuracy on held-out text, without keeping logits that nobody asks for."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Many
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedllm.data.sequences import Sequence
from fedllm.model.batch import Batch, collate, target_logits


@dataclass(frozen=True)
class LossTotals:
    """Sums over target tokens, so that results of several sites add up.

    Attributes:
        loss_sum: Negative log-likelihood in nats, over all target tokens.
        num_targets: Target tokens.
        num_correct: Those whose most likely prediction is right.
        num_exact: Sequences all of whose target tokens are predicted right: greedy decoding would answer just so.
    """

    loss_sum: float
    num_targets: int
    num_correct: int
    num_exact: int = 0

    @property
    def loss(self) -> float:
        """Nats per target token; NaN without any."""
        return self.loss_sum / self.num_targets if self.num_targets else math.nan

    @property
    def perplexity(self) -> float:
        """`exp(loss)`; infinite where that overflows."""
        return math.exp(self.loss) if not self.loss > 700 else math.inf

    @property
    def accuracy(self) -> float:
        """Share of target tokens predicted right; NaN without any."""
        return self.num_correct / self.num_targets if self.num_targets else math.nan

    def __add__(self, other: LossTotals) -> LossTotals:
        """Add the totals of two parts."""
        return LossTotals(
            self.loss_sum + other.loss_sum,
            self.num_targets + other.num_targets,
            self.num_correct + other.num_correct,
            self.num_exact + other.num_exact,
        )


Around = Callable[[Batch], AbstractContextManager[None]]
"""Sets a model up for one batch, while it computes."""


def evaluate_loss(
    model: nn.Module, sequences: Many[Sequence], batch_size: int, around: Around | None = None
) -> LossTotals:
    """Evaluate a model on sequences, in evaluation mode, and leave it in the mode it was in.

    Sequences of like length share a batch, so that little is padded; sums are in float64, so the result hardly depends on
    the batches.

    Args:
        model: With or without adapter.
        sequences: Those without target tokens count nothing.
        batch_size: Sequences computed at once.
        around: Sets the model up for each batch, None for nothing.
    """
    useful = sorted((sequence for sequence in sequences if sequence.num_targets), key=len, reverse=True)
    was_training = model.training
    model.eval()
    try:
        totals = LossTotals(0.0, 0, 0)
        for start in range(0, len(useful), batch_size):
            totals += _evaluate_batch(model, useful[start : start + batch_size], around)
        return totals
    finally:
        model.train(was_training)


@torch.inference_mode()
def _evaluate_batch(model: nn.Module, sequences: Many[Sequence], around: Around | None) -> LossTotals:
    batch = collate(sequences, model)
    with around(batch) if around else nullcontext():
        logits = target_logits(model, batch).float()  # [T, V]
    losses = cross_entropy(logits, batch.targets, reduction="none")  # [T]
    correct = logits.argmax(dim=-1) == batch.targets
    by_sequence = torch.split(correct, [sequence.num_targets for sequence in sequences])
    num_exact = sum(bool(one.all()) for one in by_sequence)
    return LossTotals(float(losses.double().sum()), len(batch.targets), int(correct.sum()), num_exact)
