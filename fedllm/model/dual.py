"""Two LoRA adapters on one base: the federation's, and one that a site trains for itself.

Yang, Long, Shen, Jiang, Blumenstein, "Dual-Personalizing Adapter for Federated Foundation Models" (FedDPA), NeurIPS 2024
(arXiv 2403.19211). With both adapters on, an adapted layer computes

    W0 x + (1 - a) s B A x + a s B' A' x

with the site's share a, which may be one number or differ from token to token. Alone, without :func:`mixed`, the model is
the federation's. Where an instance is like the site's own data, its share is large: :class:`ByLikeness`.

Tensors of the site's adapter are named ``...q_proj.personal_A.weight``, of role ``personal_A`` and ``personal_B``; its
scale s is the federation's.

Shape legend: B rows, L tokens, T targets, S reference examples, E examples of a batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

from fedllm.data.sequences import Sequence
from fedllm.model.batch import Batch, collate, hidden_at

OWN = "personal"
"""PEFT's name of the site's adapter."""

NUM_REFERENCES = 5
"""Training examples that an instance is compared with, as in the paper."""

_SHARED = "default"


def add_own(model: PeftModel, config: LoraConfig) -> None:
    """Put the site's adapter beside the federation's, switched off."""
    model.add_adapter(OWN, config)
    _switch(model, _SHARED)


def tensor_name(name: str) -> str:
    """Return the layout's name of a parameter of the site's adapter; any other name stays as it is."""
    return name.replace(f".lora_A.{OWN}.", ".personal_A.").replace(f".lora_B.{OWN}.", ".personal_B.")


def has_own(model: PeftModel) -> bool:
    """Tell whether there is a site's adapter on a model."""
    return OWN in model.peft_config


@contextmanager
def mixed(model: PeftModel, share: float | torch.Tensor) -> Iterator[None]:
    """Let both adapters compute, the site's with this share of the sum: a number, or one for each token [B, L, 1]."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    _switch(model, [_SHARED, OWN])
    try:
        for layer in layers:
            layer.scaling[_SHARED] = (1 - share) * layer.scaling[_SHARED]
            layer.scaling[OWN] = share * layer.scaling[OWN]
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
        _switch(model, _SHARED)


@dataclass(frozen=True)
class ByLikeness:
    """Gives every example the share ``scale * mean_s cos(h, h_s)``, at least 0.

    h is the last layer's hidden state at the last token before the answer, of the base with the site's adapter alone, and
    h_s the same of a few of the site's training examples.

    Attributes:
        model: Carries both adapters.
        scale: The share of an example that is just like the references.
        references: Their normed hidden states [S, H].
    """

    model: PeftModel
    scale: float
    references: torch.Tensor

    @classmethod
    def of(cls, model: PeftModel, scale: float, examples: Many[Sequence]) -> ByLikeness:
        """Measure the references.

        Args:
            model: Carries both adapters.
            scale: The share of an example that is just like the references.
            examples: Training examples, one in each sequence.
        """
        batch = collate(examples, model)
        rows, columns, _ = _ends_of_prompts(batch)
        return cls(model, scale, _normed(model, batch, rows, columns))

    @contextmanager
    def applied(self, batch: Batch) -> Iterator[None]:
        """Let both adapters compute, with each example's own share."""
        rows, columns, examples = _ends_of_prompts(batch)
        shares = self.shares(_normed(self.model, batch, rows, columns))  # [E]
        table = torch.zeros_like(batch.input_ids, dtype=torch.float32)  # [B, L]
        for row, column, share in zip(rows.tolist(), columns.tolist(), shares.tolist(), strict=True):
            table[row][examples[row] == examples[row, column]] = share
        with mixed(self.model, table[..., None]):
            yield

    @contextmanager
    def applied_to(self, input_ids: torch.Tensor) -> Iterator[None]:
        """Let both adapters compute, with the share of one question [1, L], also for what is answered to it."""
        zero, places = torch.zeros(1, dtype=torch.int64), torch.arange(input_ids.shape[1])[None]
        nothing = torch.zeros(0, dtype=torch.int64)
        batch = Batch(input_ids, places.to(input_ids.device), None, nothing, nothing, nothing, input_ids.shape[1])
        hidden = _normed(self.model, batch, zero, zero + input_ids.shape[1] - 1)
        with mixed(self.model, float(self.shares(hidden)[0])):
            yield

    def shares(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the shares [E] of examples with these normed hidden states [E, H]."""
        return (self.scale * (hidden @ self.references.T).mean(dim=1)).clamp(0.0, 1.0)


def _switch(model: PeftModel, names: str | list[str]) -> None:
    """Let these adapters compute; which parameters are trainable stays as it is."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    tuner: Any = model.base_model
    tuner.set_adapter(names)
    for parameter, was_trainable in before.items():
        parameter.requires_grad_(was_trainable)


def _ends_of_prompts(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return where the last token before each example's first target is, rows [E] and columns [E], and whose token each is:
    numbers of examples [B, L], from 1 in each row.
    """
    examples = (batch.position_ids == 0).cumsum(dim=1)
    of_targets = examples[batch.target_rows, batch.target_columns]  # [T], rows in order, columns too
    changes = (torch.diff(batch.target_rows) != 0) | (torch.diff(of_targets) != 0)
    first = torch.cat([changes.new_ones(1), changes])
    return batch.target_rows[first], batch.target_columns[first], examples


def _normed(model: PeftModel, batch: Batch, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), mixed(model, 1.0):
            hidden = hidden_at(model, batch, rows, columns).float()
            normed: torch.Tensor = hidden / hidden.norm(dim=1, keepdim=True)
            return normed
    finally:
        model.train(was_training)
