"""Clustered federation: sites that learn alike share a global adapter, each group its own.

The grouping is that of FedLEASE (Wang et al., "Adaptive LoRA Experts Allocation and Selection for Federated Fine-Tuning",
NeurIPS 2025, arXiv 2509.15087; see :mod:`strategies.clustering`); that groups of a federation are told apart by the cosines
of their updates is due to Sattler, Müller, Samek, "Clustered Federated Learning: Model-Agnostic Distributed Multi-Task
Optimization under Privacy Constraints" (arXiv 1910.01991).

Round `strategy.grouping_round` is an ordinary round of FedAvg from one start, after which every group's adapter is the mean
of its own sites' updates; from then on each group is a federation of its own. Where no groups stand out, it stays FedAvg.

Where we differ from FedLEASE: a site uses its group's adapter alone; there is no router that mixes the experts of several.
"""

from __future__ import annotations

from dataclasses import replace

from fedllm.config import RunConfig
from strategies.clustering import AlikeByB
from strategies.fedavg import fedavg
from strategies.slots import Strategy


def clustered(config: RunConfig) -> Strategy:
    """Choose FedAvg's slots, in groups of sites that are found by the cosines of B."""
    grouping = AlikeByB(config.strategy.grouping_round, config.strategy.max_groups)
    return replace(fedavg(config), name="clustered", grouping=grouping)
