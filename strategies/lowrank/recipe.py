"""What the recipes that average products have in common."""

from __future__ import annotations

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, explain
from fedllm.model.spec import LoraSpec
from fedllm.work import ClientWork
from strategies.fedavg import fedavg
from strategies.lowrank.mean import ProductMean
from strategies.lowrank.rules import Rule
from strategies.optimizers import Sgd
from strategies.robust.build import build_aggregator
from strategies.slots import Strategy
from strategies.works import Always

SIDE_RANKS = 8
"""Rank of the side factors in multiples of the adapter's, where the config does not say."""


def product_strategy(
    config: RunConfig,
    name: str,
    rule: Rule,
    *,
    keeps_rest: bool,
    re_factors: bool = True,
    trainable: tuple[str, ...] = ("lora_A", "lora_B"),
    is_exact: bool = False,
) -> Strategy:
    """Choose slots that average products and factor the mean anew; a rule that judges sites may stand in front.

    The server optimizer is the plain one: part of the way between two pairs of factors lies the product of neither, so
    :mod:`strategies.compatibility` refuses others.

    Args:
        config: The run's.
        name: The strategy's.
        rule: Makes the next factors.
        keeps_rest: What they lack goes into side factors, in place of being lost.
        re_factors: The next factors are not moved averages but others, so what a site's codec dropped of its factors has
            no meaning for them and is not carried on.
        trainable: Roles of the tensors that sites train.
        is_exact: See :attr:`strategies.slots.Strategy.is_exact`.

    Raises:
        ConfigError: The adapter is no LoRA.
    """
    adapter = require_lora(config)
    work = ClientWork(trainable=trainable, carries_residual=not re_factors)
    plain = fedavg(config)
    return Strategy(
        name=name,
        sampler=plain.sampler,
        work=Always(work),
        aggregator=build_aggregator(config, ProductMean(rule, adapter.scale, config.seed)),
        optimizer=Sgd(),
        side_rank=(adapter.side_rank or SIDE_RANKS * adapter.rank) if keeps_rest else 0,
        is_exact=is_exact,
    )


def require_lora(config: RunConfig) -> LoraSpec:
    """Return the run's LoRA settings.

    Raises:
        ConfigError: The adapter is another one.
    """
    adapter = config.spec.adapter
    if not isinstance(adapter, LoraSpec):
        where = f"strategy.name={config.strategy.name!r}"
        fix = "Choose adapter.kind='lora', or another strategy."
        raise ConfigError(
            explain("the strategy aggregates products of LoRA factors", found=adapter.kind, where=where, fix=fix)
        )
    return adapter
