"""FedProx: FedAvg whose sites are pulled back to where the round started.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020 (arXiv
1812.06127).

A site minimises its loss plus ``mu/2 |w - w_received|^2`` (:mod:`client_app.training.drift`). The paper lets sites do
different amounts of work; here all take the same number of steps. With mu = 0 it is FedAvg bit for bit.
"""

from __future__ import annotations

from dataclasses import replace

from fedllm.config import RunConfig
from fedllm.work import ClientWork
from strategies.fedavg import fedavg
from strategies.slots import Strategy
from strategies.works import Always


def fedprox(config: RunConfig) -> Strategy:
    """Choose FedAvg's slots with the proximal term."""
    work = ClientWork(proximal=config.strategy.proximal_mu)
    return replace(fedavg(config), name="fedprox", work=Always(work))
