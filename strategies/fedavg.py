"""FedAvg on LoRA factors (FedIT), with any server optimizer (FedOpt).

McMahan et al., AISTATS 2017 (arXiv 1602.05629); Zhang et al., "Towards Building the Federated GPT: Federated Instruction
Tuning", ICASSP 2024 (arXiv 2305.05644); Reddi et al., ICLR 2021 (arXiv 2003.00295).

Sites train both factors; the server averages A and B apart, weighted by examples. The product of the averages is not the
average of the products: see :class:`strategies.aggregators.WeightedMean`.
"""

from __future__ import annotations

from fedllm.config import RunConfig, StrategyConfig
from strategies import optimizers
from strategies.aggregators import WeightedMean
from strategies.samplers import UniformSampler
from strategies.slots import ClientWork, ServerOptimizer, Strategy


def fedavg(config: RunConfig) -> Strategy:
    """Choose FedAvg's four slots."""
    rounds = config.rounds
    return Strategy(
        name="fedavg",
        sampler=UniformSampler(config.seed, rounds.fraction, rounds.min_sites, rounds.over_selection),
        work=ClientWork(),
        aggregator=WeightedMean(),
        optimizer=build_optimizer(config.strategy),
    )


def build_optimizer(config: StrategyConfig) -> ServerOptimizer:
    """Turn the strategy section into a server optimizer."""
    rate = config.server_learning_rate
    if config.server_optimizer == "sgd":
        return optimizers.Sgd(rate, config.server_momentum)
    if config.server_optimizer == "adagrad":
        return optimizers.Adagrad(rate, config.server_tau)
    yogi = config.server_optimizer == "yogi"
    return optimizers.Adam(rate, config.server_beta_1, config.server_beta_2, config.server_tau, yogi)
