"""FLoRA: stack the sites' factors, and start again from a fresh adapter.

Wang, Shen, He, Sun, Wang, Lyu, Li, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", NeurIPS 2024 (arXiv 2409.05976).

Factors of all sites side by side are the weighted sum of their products, `[p_1 s_1 B_1 | ... ] [A_1; ...]`, exactly and at
any mixture of ranks. After each round A is drawn anew and B is zero.

Where we differ: the paper merges the sum into the base. A 4-bit base would round it away, so it is added to the side
factors, recompressed to their rank where it does not fit (`discarded_energy` says what that costs); and what travels down
is that, not the stack, whose rank grows with the number of sites.
"""

from __future__ import annotations

from fedllm.config import RunConfig
from strategies.lowrank.recipe import product_strategy
from strategies.lowrank.rules import Restart
from strategies.slots import Strategy


def flora(config: RunConfig) -> Strategy:
    """Choose FLoRA's four slots."""
    return product_strategy(config, "flora", Restart(), keeps_rest=True, is_exact=True)
