"""From the strategy section to an aggregator."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from fedllm.config import RunConfig, StrategyConfig
from fedllm.errors import ConfigError, explain
from fedllm.model.spec import LoraSettings
from strategies.aggregators import WeightedMean
from strategies.robust.coordinates import CoordinateMedian, TrimmedMean
from strategies.robust.fltrust import FLTrust
from strategies.robust.geometric_median import GeometricMedian
from strategies.robust.judged import Judged, SiteRule
from strategies.robust.krum import Krum
from strategies.robust.norm_bound import NormBound
from strategies.robust.products import Products
from strategies.robust.space import Factors, SpaceOf
from strategies.slots import Aggregator

SITE_RULES: dict[str, Callable[[StrategyConfig], SiteRule]] = {
    "krum": lambda section: Krum(section.byzantine_sites),
    "multi-krum": lambda section: Krum(section.byzantine_sites, multi=True),
    "geometric-median": lambda _: GeometricMedian(),
    "fltrust": lambda section: FLTrust(section.trusted_site),
}
"""Rules that weigh whole updates; they stand in front of an inner aggregator."""

COORDINATE_RULES: dict[str, Callable[[StrategyConfig], Aggregator]] = {
    "median": lambda _: CoordinateMedian(),
    "trimmed-mean": lambda section: TrimmedMean(section.trim_fraction),
}
"""Rules that are aggregators by themselves."""


def build_aggregator(config: RunConfig, inner: Aggregator | None = None) -> Aggregator:
    """Build the aggregator that `strategy.aggregator` and `strategy.norm_bound` ask for.

    Args:
        config: The effective config, which :func:`strategies.compatibility.check_compatibility` has passed.
        inner: What becomes of the updates that a rule lets pass, None for their weighted mean.
    """
    section, compare = config.strategy, _compare(config)
    aggregator = _ruled(section, compare, inner or WeightedMean())
    if section.norm_bound == 0:
        return aggregator
    bound = None if section.norm_bound == "median" else section.norm_bound
    return Judged(NormBound(bound), compare, aggregator)


def _ruled(section: StrategyConfig, compare: SpaceOf, inner: Aggregator) -> Aggregator:
    name = section.aggregator
    if name == "mean":
        return inner
    if name in SITE_RULES:
        return Judged(SITE_RULES[name](section), compare, inner)
    if name in COORDINATE_RULES:
        return COORDINATE_RULES[name](section)
    known = ", ".join(["mean", *COORDINATE_RULES, *SITE_RULES])
    raise ConfigError(explain("unknown aggregator", expected=f"one of {known}", found=name))


def _compare(config: RunConfig) -> SpaceOf:
    if config.strategy.robust_on == "factors":
        return Factors
    return partial(Products, scale=partial(lora_scale, config.adapter))


def lora_scale(adapter: LoraSettings, rank: int) -> float:
    """Return the factor `s` on `B A` for a rank."""
    return adapter.alpha / (math.sqrt(rank) if adapter.rslora else rank)
