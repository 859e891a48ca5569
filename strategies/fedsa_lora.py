"""FedSA-LoRA: sites train both factors and share A alone; B stays with its site.

Guo, Zeng, Wang, Fan, Wang, Qu, "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025 (arXiv
2410.01463).

The paper finds that A learns what sites have in common and B what is a site's own. Half of the adapter travels, and
every site ends with an adapter of its own: the federation's A with its B (:mod:`client_app.kept`). There is no single
global model, so evaluation is of each site's own adapter, and the exported global adapter, A with B still zero, computes
the base.
"""

from __future__ import annotations

from dataclasses import replace

from fedllm.config import RunConfig
from fedllm.work import ClientWork
from strategies.fedavg import fedavg
from strategies.slots import Strategy
from strategies.works import Always


def fedsa_lora(config: RunConfig) -> Strategy:
    """Choose FedAvg's slots with B private."""
    return replace(fedavg(config), name="fedsa-lora", work=Always(ClientWork(private=("lora_B",))))
