"""FLoRIST: as many components of the mean product, layer by layer, as hold a share of its energy.

Ramesh, Dass, "FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large Language
Models", MLSys 2026 (arXiv 2506.09199).

Each layer keeps the fewest singular components whose squared values sum up to `strategy.energy_threshold` of all, at most
the adapter's rank; the error is the root of what is left out. Components that are free again start anew.

Where we differ: with `strategy.lossless` what is left out is not lost but goes into the side factors, which makes the
round exact as long as it fits their rank. The even split of singular values is in :mod:`strategies.lowrank.spectrum`.
"""

from __future__ import annotations

from fedllm.config import RunConfig
from strategies.lowrank.recipe import product_strategy
from strategies.lowrank.rules import TopComponents
from strategies.slots import Strategy


def florist(config: RunConfig) -> Strategy:
    """Choose FLoRIST's four slots."""
    lossless = config.strategy.lossless
    rule = TopComponents(config.strategy.energy_threshold)
    return product_strategy(config, "florist", rule, keeps_rest=lossless, is_exact=lossless)
