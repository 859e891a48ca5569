"""LoRA-FAIR: average the factors, and correct B towards the mean product.

Bian, Wang, Zhang, Xu, "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement", ICCV 2025
(arXiv 2411.14961).

What travels is what FedAvg sends; the correction costs the server one small solve a layer. It removes the part of
FedAvg's error that lies in the row space of the mean A, which is the smaller part: see :mod:`strategies.lowrank.fair`,
also for where we differ.
"""

from __future__ import annotations

from fedllm.config import RunConfig
from strategies.lowrank.recipe import product_strategy
from strategies.lowrank.rules import Corrected
from strategies.slots import Strategy


def lora_fair(config: RunConfig) -> Strategy:
    """Choose LoRA-FAIR's four slots."""
    rule = Corrected(config.strategy.ridge)
    return product_strategy(config, "lora-fair", rule, keeps_rest=False, re_factors=False)
