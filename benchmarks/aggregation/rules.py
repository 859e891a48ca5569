"""What is measured: run configs by the name of the aggregator that they lead to.

Strategies that differ elsewhere share one of these: `fedprox`, `fedrot` and `clustered` are the mean, `scaffold` is that of
twice the numbers; `rolora` and `fedsa-lora` are the mean of half the numbers, as `ffa-lora` is; `fed-sb` begins as
`flexlora` does, and goes on, as `ravan`, with the mean of few numbers.
"""

from __future__ import annotations

from fedllm.config import RunConfig, read_run_config

Settings = dict[str, str | int | float]

AVERAGES = ("fedavg", "ffa-lora", "zero-padding", "hetlora")
PRODUCTS = ("lora-fair", "fedsvd", "flexlora", "florist", "fedex", "flora")
ROBUST: dict[str, Settings] = {
    "norm-bound": {"strategy.norm_bound": "median"},
    "median": {"strategy.aggregator": "median"},
    "trimmed-mean": {"strategy.aggregator": "trimmed-mean", "strategy.trim_fraction": 0.2},
    "krum": {"strategy.aggregator": "krum"},
    "multi-krum": {"strategy.aggregator": "multi-krum"},
    "geometric-median": {"strategy.aggregator": "geometric-median"},
    "fltrust": {"strategy.aggregator": "fltrust", "strategy.trusted_site": "site-0000"},
}
ON_PRODUCTS: dict[str, Settings] = {
    "krum on products": {**ROBUST["krum"], "strategy.robust_on": "products"},
}

SETTINGS: dict[str, Settings] = {
    **{name: {"strategy.name": name} for name in (*AVERAGES, *PRODUCTS)},
    **ROBUST,
    **ON_PRODUCTS,
}
"""Settings by name; where no strategy is named it is `fedavg`."""

AT_ONCE = (*PRODUCTS, *ROBUST, *ON_PRODUCTS)
"""Aggregators that need all updates at once."""


def config_for(name: str, rank: int, num_sites: int) -> RunConfig:
    """Return the run config of an aggregator."""
    common: Settings = {"adapter.rank": rank, "adapter.alpha": 2.0 * rank, "rounds.min_sites": num_sites}
    return read_run_config({**common, **SETTINGS[name]})
