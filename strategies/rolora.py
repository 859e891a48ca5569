"""RoLoRA: odd rounds train and send B, even rounds A.

Chen, Guo, Ju, Dalal, Zhu, Khisti, "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", NeurIPS
2025 (arXiv 2502.01755).

In each round one factor is the same at every site, so averaging the other is exact, as in FFA-LoRA, and half of the
adapter travels; over two rounds both factors learn. B goes first: while B is zero, A has no gradient.

The server optimizer's moments and bias corrections count the rounds of each factor by itself.
"""

from __future__ import annotations

from dataclasses import replace

from fedllm.config import RunConfig
from fedllm.work import ClientWork
from strategies.fedavg import fedavg
from strategies.slots import Strategy
from strategies.works import InTurn


def rolora(config: RunConfig) -> Strategy:
    """Choose FedAvg's slots with B and A trained in turn."""
    works = (ClientWork(trainable=("lora_B",)), ClientWork(trainable=("lora_A",)))
    return replace(fedavg(config), name="rolora", work=InTurn(works), is_exact=True)
