"""FedEx-LoRA: average the factors, and keep what the average lacks.

Singhal, Ponkshe, Vepakomma, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language
Models", ACL 2025 (arXiv 2410.09432).

Sites go on from the mean factors, and the residual `sum_k p_k s_k B_k A_k - s B A` is applied beside them, so together they
are the weighted mean of what the sites applied.

Where we differ: the paper adds the residual to the frozen base, which a 4-bit base rounds away; here it is in the side
factors, recompressed to their rank where it does not fit. The scale alpha / rank is inside, which published code forgets.
"""

from __future__ import annotations

from fedllm.config import RunConfig
from strategies.lowrank.recipe import product_strategy
from strategies.lowrank.rules import Averages
from strategies.slots import Strategy


def fedex(config: RunConfig) -> Strategy:
    """Choose FedEx-LoRA's four slots."""
    return product_strategy(config, "fedex", Averages(), keeps_rest=True, re_factors=False, is_exact=True)
