"""FedPer on LoRA: the adapters of the lower layers are shared, those of the upper layers stay at their site.

Arivazhagan, Aggarwal, Singh, Choudhary, "Federated Learning with Personalization Layers" (arXiv 1912.00818).

There the split is between body and head; here it is between the layers of the base, whose lower ones are held to be more
general. A site trains all and sends its share (:mod:`client_app.kept` keeps the rest). The exported global adapter is the
shared part, with the upper layers as they were drawn: they compute what the base computes.
"""

from __future__ import annotations

from dataclasses import replace

from fedllm.config import RunConfig
from fedllm.work import ClientWork
from strategies.fedavg import fedavg
from strategies.slots import Strategy
from strategies.works import Always


def fedper(config: RunConfig) -> Strategy:
    """Choose FedAvg's slots with the upper layers private."""
    return replace(fedavg(config), name="fedper", work=Always(ClientWork(shared_depth=config.strategy.shared_depth)))
