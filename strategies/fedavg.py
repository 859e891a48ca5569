"""FedAvg on LoRA factors (FedIT), with any server optimizer (FedOpt).

McMahan et al., AISTATS 2017 (arXiv 1602.05629); Zhang et al., "Towards Building the Federated GPT: Federated Instruction
Tuning", ICASSP 2024 (arXiv 2305.05644); Reddi et al., ICLR 2021 (arXiv 2003.00295).

Sites train both factors; the server averages A and B apart, weighted by examples. The product of the averages is not the
average of the products: see :class:`strategies.aggregators.WeightedMean`. `strategy.aggregator` puts a robust rule in the
mean's place, `strategy.norm_bound` bounds what a site can do to it.
"""

from __future__ import annotations

from fedllm.config import RunConfig, StrategyConfig
from fedllm.work import ClientWork
from strategies import optimizers
from strategies.annealing import Annealed
from strategies.robust.build import build_aggregator
from strategies.samplers import build_sampler
from strategies.slots import ServerOptimizer, Strategy
from strategies.works import Always


def fedavg(config: RunConfig) -> Strategy:
    """Choose FedAvg's four slots."""
    return Strategy(
        name="fedavg",
        sampler=build_sampler(config),
        work=Always(ClientWork()),
        aggregator=build_aggregator(config),
        optimizer=build_optimizer(config),
    )


def build_optimizer(config: RunConfig) -> ServerOptimizer:
    """Turn the strategy section into a server optimizer, annealed if it says so."""
    section = config.strategy
    optimizer = _constant(section)
    if section.server_anneal == "constant":
        return optimizer
    return Annealed(optimizer, section.server_anneal, section.server_final_rate, config.num_rounds)


def _constant(section: StrategyConfig) -> ServerOptimizer:
    rate = section.server_learning_rate
    if section.server_optimizer == "sgd":
        return optimizers.Sgd(rate, section.server_momentum)
    if section.server_optimizer == "adagrad":
        return optimizers.Adagrad(rate, section.server_tau)
    yogi = section.server_optimizer == "yogi"
    return optimizers.Adam(rate, section.server_beta_1, section.server_beta_2, section.server_tau, yogi)
