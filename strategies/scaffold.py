"""SCAFFOLD: control variates take the sites' drift out of their local steps.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML
2020 (arXiv 1910.06378).

Every local step takes ``g - c_k + c``: the site's own mean gradient is swapped for the federation's, so that sites whose
optima differ no longer pull the average to a point that is nobody's (:mod:`client_app.variates`). The variates travel
beside the adapter and double the traffic in both directions. While c and all c_k are zero, in the first round, it is
FedAvg. It is made for local SGD: AdamW rescales what it is given, so there the correction is a heuristic.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from fedllm.config import RunConfig
from fedllm.work import ClientWork
from strategies.control import ControlApart, ControlledMean
from strategies.fedavg import fedavg
from strategies.slots import Strategy
from strategies.works import Always

log = logging.getLogger(__name__)


def scaffold(config: RunConfig) -> Strategy:
    """Choose FedAvg's slots with control variates in work, aggregator and optimizer."""
    if config.train.optimizer != "sgd":
        log.warning("SCAFFOLD corrects SGD steps; with train.optimizer=%r it is a heuristic", config.train.optimizer)
    plain = fedavg(config)
    return replace(
        plain,
        name="scaffold",
        work=Always(ClientWork(control_variates=True)),
        aggregator=ControlledMean(plain.aggregator),
        optimizer=ControlApart(plain.optimizer),
    )
