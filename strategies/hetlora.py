"""Averages of factors padded with zeros: HetLoRA, and the plain rule that it improves on.

Cho et al., EMNLP 2024 (arXiv 2401.06432). Sites of smaller rank apply and train their own components only. HetLoRA weighs
them by the norm of what they apply (:mod:`strategies.lowrank.padded`), and has a site whose last components shrink under a
penalty give them up for good, one round after the other (:mod:`client_app.training.tail`): where `adapter.min_rank` lets
sites choose, down to that rank. Baselines for the strategies that average products.
"""

from __future__ import annotations

from dataclasses import replace

from fedllm.config import RunConfig
from fedllm.work import ClientWork
from strategies.fedavg import fedavg
from strategies.lowrank.padded import PaddedMean, Weighting
from strategies.lowrank.recipe import require_lora
from strategies.slots import Strategy
from strategies.works import Always


def hetlora(config: RunConfig) -> Strategy:
    """Choose HetLoRA's four slots: sites are weighted by the norm of what they apply, and give up what shrinks."""
    section = config.strategy
    prunes = {"pruning": section.pruning, "tail_penalty": section.tail_penalty} if config.adapter.min_rank else {}
    return _padded(config, "hetlora", "norm", **prunes)


def zero_padding(config: RunConfig) -> Strategy:
    """Choose the plain rule's four slots: sites have their usual weights."""
    return _padded(config, "zero-padding", "contribution")


def _padded(config: RunConfig, name: str, weighting: Weighting, **further: float) -> Strategy:
    adapter = require_lora(config)
    work = ClientWork.model_validate({"trainable": ("lora_A", "lora_B"), "truncates": True, **further})
    return replace(fedavg(config), name=name, work=Always(work), aggregator=PaddedMean(weighting, adapter.scale))
