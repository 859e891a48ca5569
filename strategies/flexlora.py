"""FlexLoRA: the largest components of the mean product, of which each site takes as many as it can train.

Bai, Chen, Qian, Yao, Li, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
NeurIPS 2024 (arXiv 2402.11505).

The weighted sum of the sites' products is cut to the adapter's rank by its singular values; a site of smaller rank trains
the first components and applies the others as they are.

Where we differ: no dense matrix is decomposed (:mod:`strategies.lowrank.spectrum`), singular values are split evenly over
both factors, and a site applies the whole global product, not only its own components. What does not fit into the rank is
lost, and measured; `florist` with `strategy.lossless` keeps it.
"""

from __future__ import annotations

from fedllm.config import RunConfig
from strategies.lowrank.recipe import product_strategy
from strategies.lowrank.rules import TopComponents
from strategies.slots import Strategy


def flexlora(config: RunConfig) -> Strategy:
    """Choose FlexLoRA's four slots."""
    return product_strategy(config, "flexlora", TopComponents(), keeps_rest=False)
