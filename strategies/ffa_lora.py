"""FFA-LoRA: A stays as it was drawn, sites train and send B.

Sun, Li, Li, Ding, "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024 (arXiv 2403.12313).

With one A at every site the mean of the products is the product of the mean, ``mean(B_k) A = mean(B_k A)``, so averaging
is exact, and half of the adapter never travels: A comes from the run's seed at both ends. The price is that the update's
row space is that of a random A for ever, which shows where the rank is small and the target is not in it.

The paper draws A as PEFT does, and so do we (:mod:`fedllm.model.initial`).
"""

from __future__ import annotations

from dataclasses import replace

from fedllm.config import RunConfig
from fedllm.work import ClientWork
from strategies.fedavg import fedavg
from strategies.slots import Strategy
from strategies.works import Always


def ffa_lora(config: RunConfig) -> Strategy:
    """Choose FedAvg's slots with B alone trained."""
    return replace(fedavg(config), name="ffa-lora", work=Always(ClientWork(trainable=("lora_B",))), is_exact=True)
