"""Fed-SB: two factors are fixed after the first round, and sites train the square matrix between them.

Singhal, Ponkshe, Vartak, Varshney, Vepakomma, "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance
in (Private) Federated LoRA Fine-Tuning", TMLR 2026 (arXiv 2502.15436).

`W = W0 + s B M A` is linear in M, so the mean of the M is the mean of the products: exact, and R^2 numbers a layer travel,
whatever its size. The fixed factors are the singular vectors of a first step, and M starts as its singular values.

Where we differ: the paper's first step is one of full fine-tuning on some examples that somebody must hold, and published
code takes it outside of the privacy accounting. Here it is the federation's own first round of LoRA, which is clipped,
noised and sent like any other (:mod:`strategies.lowrank.first_step`).
"""

from __future__ import annotations

from dataclasses import replace

from fedllm.config import RunConfig
from fedllm.work import ClientWork
from strategies.fedavg import fedavg
from strategies.lowrank.first_step import FirstStep
from strategies.lowrank.mean import ProductMean
from strategies.lowrank.recipe import require_lora
from strategies.lowrank.rules import Orthogonal
from strategies.robust.build import build_aggregator
from strategies.slots import Strategy
from strategies.works import FirstThen


def fed_sb(config: RunConfig) -> Strategy:
    """Choose Fed-SB's four slots."""
    step = ProductMean(Orthogonal(), require_lora(config).scale, config.seed)
    factors = ClientWork(trainable=("lora_A", "lora_B"), carries_residual=False)
    return replace(
        fedavg(config),
        name="fed-sb",
        work=FirstThen(factors, ClientWork(trainable=("lora_M",))),
        aggregator=FirstStep(build_aggregator(config, step), build_aggregator(config)),
        num_heads=1,
    )
