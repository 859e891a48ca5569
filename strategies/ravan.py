"""Ravan: several heads with factors as they were drawn, and sites train the square matrix of each.

Raje, Askin, Didolkar, Joshi, "Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning", NeurIPS 2025 (arXiv
2506.05568).

`W = W0 + s sum_h g_h B_h M_h A_h` with random B_h and A_h, which come from the run's seed at both ends and never travel. As
in Fed-SB the mean of the M_h is the mean of the products. H heads of rank R/H have R^2/H numbers a layer: for the same
traffic the rank is larger than that of one matrix. Sites also train the gains g_h; they fold them into the matrices before
they send (:mod:`fedllm.model.heads`), where the paper's server does.

Where we differ: factors have normal entries, orthogonal in the mean and not to the last digit
(:mod:`fedllm.model.initial`), and every site trains all heads.
"""

from __future__ import annotations

import math
from dataclasses import replace

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, explain
from fedllm.work import ClientWork
from strategies.fedavg import fedavg
from strategies.lowrank.recipe import require_lora
from strategies.slots import Strategy
from strategies.works import Always

NUM_HEADS = 4
"""Heads where the config does not say, or as many of them as divide the rank."""


def ravan(config: RunConfig) -> Strategy:
    """Choose Ravan's four slots.

    Raises:
        ConfigError: There is one head only, or heads do not divide the rank.
    """
    rank = require_lora(config).rank
    num_heads = config.adapter.num_heads or math.gcd(rank, NUM_HEADS)
    if num_heads < 2 or rank % num_heads:
        expected = f"a divisor of adapter.rank={rank}, at least 2"
        raise ConfigError(
            explain("heads do not fit the adapter", expected=expected, found=num_heads, where="adapter.num_heads")
        )
    work = Always(ClientWork(trainable=("head_M",)))
    return replace(fedavg(config), name="ravan", work=work, num_heads=num_heads, is_exact=True)
