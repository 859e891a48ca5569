"""FedSVD: sites train B; the server factors the mean product anew, so that A has orthonormal rows.

Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", NeurIPS 2025 (arXiv 2505.12805).

As in FFA-LoRA the mean of the products is the product of the mean. Factoring it as `(U S)(V^T)` changes nothing that is
applied, so it is free under differential privacy, and it keeps the gradients of B well conditioned. It does not enlarge
the space: the rows of every A stay in the row space of the first (:mod:`strategies.lowrank.refactor`).
"""

from __future__ import annotations

from fedllm.config import RunConfig
from strategies.lowrank.recipe import product_strategy
from strategies.lowrank.rules import Refactored
from strategies.slots import Strategy


def fedsvd(config: RunConfig) -> Strategy:
    """Choose FedSVD's four slots."""
    return product_strategy(config, "fedsvd", Refactored(), keeps_rest=False, trainable=("lora_B",), is_exact=True)
