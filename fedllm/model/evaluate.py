"""Loss and accuracy on held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Any

import torch

from fedllm.data.sequences import Sequence
from fedllm.errors import DataError, TrainingError, explain
from fedllm.model.batch import collate, loss_sum, target_logits


@dataclass(frozen=True)
class LossTotals:
    """Sums over target tokens.

    Attributes:
        loss_sum: Cross-entropy in nats.
        num_targets: Tokens that were to be predicted.
        num_correct: Tokens that the model ranks first.
    """

    loss_sum: float
    num_targets: int
    num_correct: int

    @property
    def loss(self) -> float:
        """Mean cross-entropy over target tokens, in nats."""
        return self.loss_sum / self.num_targets

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss, infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def accuracy(self) -> float:
        """Share of target tokens that the model ranks first."""
        return self.num_correct / self.num_targets


def evaluate_loss(model: Any, sequences: Several[Sequence], batch_size: int) -> LossTotals:
    """Evaluate a model on sequences; sequences of similar length share a batch, so little is padded.

    Raises:
        DataError: There is no target token.
        TrainingError: The loss is not finite.
    """
    device = next(model.parameters()).device
    ordered = sorted(sequences, key=len)
    loss, num_targets, num_correct = 0.0, 0, 0
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(ordered), batch_size):
            batch = collate(ordered[start : start + batch_size]).to(device)
            logits = target_logits(model, batch)
            loss += float(loss_sum(logits, batch.targets).double())
            num_targets += batch.num_targets
            num_correct += int((logits.argmax(-1) == batch.targets).sum())
    if num_targets == 0:
        raise DataError(explain("there is nothing to evaluate", found=f"{len(ordered)} sequences without a target"))
    if not math.isfinite(loss):
        raise TrainingError(explain("the evaluation's loss is not finite", found=loss, fix="Lower the learning rate."))
    return LossTotals(loss, num_targets, num_correct)
