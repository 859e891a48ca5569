"""FedRot-LoRA: sites turn their factors towards the federation's before the mean is taken.

Zhang, Kim, Cha, Vikalo, "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA", ICML 2026 (arXiv 2602.23638).

The turn leaves every site's product as it is and makes the mean of the factors a better stand-in for the mean of the
products, at the price of one small SVD a layer at the site (:mod:`fedllm.lora.alignment`).
"""

from __future__ import annotations

from dataclasses import replace

from fedllm.config import RunConfig
from fedllm.work import ClientWork
from strategies.fedavg import fedavg
from strategies.slots import Strategy
from strategies.works import Always


def fedrot(config: RunConfig) -> Strategy:
    """Choose FedAvg's slots with aligned factors."""
    return replace(fedavg(config), name="fedrot", work=Always(ClientWork(alignment=config.strategy.alignment)))
