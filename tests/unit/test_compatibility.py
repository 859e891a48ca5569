"""What may be combined with what, as the server checks it before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import pytest

from fedllm.config import RunConfig, Scalar, describe, read_run_config
from fedllm.errors import ConfigError
from fedllm.model.spec import AdapterKind
from server_app.app import open_run
from strategies.compatibility import BOUNDS, EFFECTS, FEATURES, REFUSALS, check_compatibility, without_effect
from strategies.registry import RECIPES
from strategies.robust.build import COORDINATE_RULES, SITE_RULES
from tests.robust_tools import RULES

ENOUGH: dict[str, Scalar] = {"rounds.min_sites": 5}


def check(settings: Mapping[str, Scalar]) -> None:
    check_compatibility(read_run_config(settings))


@pytest.mark.parametrize("rule", list(RULES))
def test_every_rule_goes_with_fedavg_quantized_uplinks_and_a_norm_bound(rule: str) -> None:
    check({**ENOUGH, **RULES[rule], "transport.uplink": "delta|nf4:64|zstd:3"})
    check({**ENOUGH, **RULES[rule], "strategy.norm_bound": 2.5, "transport.uplink": "delta|mask:0.25|int8:256"})


@pytest.mark.parametrize("rule", list(RULES))
def test_no_rule_compares_different_parts_of_updates(rule: str) -> None:
    with pytest.raises(ConfigError, match="with segment: sites send different parts"):
        check({**ENOUGH, **RULES[rule], "transport.uplink": "delta|segment:4|fp32"})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strategy.aggregator": "median", "transport.uplink": "delta|topk:0.1|fp32|rice"}, "'median'.*topk.*zero"),
        ({"strategy.aggregator": "trimmed-mean", "transport.uplink": "delta|topk:0.1|fp32|rice"}, "topk"),
        ({"strategy.aggregator": "median", "strategy.robust_on": "products"}, "'products': the rule has no verdict"),
        ({"strategy.aggregator": "multi-krum", "strategy.robust_on": "products"}, "averages factors.*ruin the mean"),
        ({"strategy.norm_bound": "median", "strategy.robust_on": "products"}, "averages factors.*ruin the mean"),
        ({"strategy.aggregator": "krum", "strategy.byzantine_sites": 2}, r"n >= 2f \+ 3.*Raise rounds.min_sites"),
        ({"strategy.aggregator": "multi-krum", "strategy.byzantine_sites": 2}, r"n >= 2f \+ 3"),
        ({"strategy.aggregator": "median", "strategy.byzantine_sites": 3}, "more than half.*honest"),
        ({"strategy.aggregator": "geometric-median", "strategy.byzantine_sites": 3}, "more than half.*honest"),
        ({"strategy.aggregator": "trimmed-mean", "strategy.trim_fraction": 0.1}, "at least one value at either end"),
        ({"strategy.aggregator": "trimmed-mean", "strategy.byzantine_sites": 2}, "as many as strategy.byzantine"),
        ({"strategy.aggregator": "fltrust"}, "Name one in strategy.trusted_site"),
        (
            {"strategy.aggregator": "fltrust", "strategy.trusted_site": "a", "rounds.fraction": 0.5},
            "every round needs the trusted site",
        ),
        ({"strategy.name": "scaffold", "adapter.min_rank": 2}, "one shape and one scale at all sites"),
        ({"strategy.name": "fedrot", "adapter.min_rank": 2}, "turning factors mixes the components"),
        ({"strategy.name": "ravan", "adapter.min_rank": 2}, "one size at all sites"),
        ({"strategy.name": "fed-sb", "strategy.aggregator": "median"}, "the middle of products has no low rank"),
        ({"strategy.name": "flora", "transport.uplink": "delta|segment:4|fp32"}, "a product needs both"),
        ({"strategy.name": "fedex", "adapter.kind": "prompt"}, "about LoRA's two factors"),
        ({"strategy.name": "hetlora", "strategy.aggregator": "multi-krum"}, "chooses its own aggregator"),
        ({"strategy.name": "flora", "strategy.aggregator": "median"}, "the middle of products has no low rank"),
        ({"simulation.ranks": "4,8"}, "Set adapter.min_rank to the smallest"),
        ({"simulation.ranks": "4,9", "adapter.min_rank": 4}, "adapter.rank to the largest"),
        ({"simulation.alphas": "4,8"}, "no alpha of their own"),
        ({"strategy.name": "fedprompt"}, "'fedprompt' cannot be combined with adapter.kind = 'lora'"),
        ({"strategy.name": "rolora", "adapter.kind": "prefix"}, "about LoRA's two factors"),
        ({"strategy.name": "ffa-lora", "adapter.kind": "prompt"}, "about LoRA's two factors"),
        (
            {"adapter.kind": "prompt", "strategy.aggregator": "krum", "strategy.robust_on": "products"},
            "a soft prompt has no products",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(settings: Mapping[str, Scalar], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check({**ENOUGH, **settings})


@pytest.mark.parametrize("kind", ["prompt", "prefix", "ptuning"])
@pytest.mark.parametrize("rule", list(RULES))
def test_every_rule_goes_with_soft_prompts(kind: str, rule: str) -> None:
    check({**ENOUGH, **RULES[rule], "strategy.name": "fedprompt", "adapter.kind": kind})


@pytest.mark.parametrize(("liars", "fewest"), [(0, 3), (1, 5), (4, 11)])
def test_krum_is_allowed_from_exactly_two_f_plus_three_sites(liars: int, fewest: int) -> None:
    rule = {"strategy.aggregator": "krum", "strategy.byzantine_sites": liars}
    check({**rule, "rounds.min_sites": fewest})
    with pytest.raises(ConfigError, match="krum"):
        check({**rule, "rounds.min_sites": fewest - 1})


def test_products_are_judged_where_they_are_averaged_or_one_is_taken_whole() -> None:
    products = {**ENOUGH, "strategy.robust_on": "products"}
    for name in ("fedavg", "rolora", "ffa-lora"):
        check({**products, "strategy.name": name, "strategy.aggregator": "krum"})
    for rule in SITE_RULES:
        settings = {"strategy.aggregator": rule, "strategy.norm_bound": "median", "strategy.trusted_site": "x"}
        check({**products, **settings, "strategy.name": "ffa-lora"})


@pytest.mark.parametrize("name", ["fedex", "lora-fair"])
def test_what_goes_on_from_the_mean_factors_is_judged_on_factors(name: str) -> None:
    """An update that changes no product but ruins the mean factors passes a rule on products."""
    ruled = {**ENOUGH, "strategy.name": name, "strategy.aggregator": "multi-krum"}
    check(ruled)
    with pytest.raises(ConfigError, match=r"averages factors.*ruin the mean"):
        check({**ruled, "strategy.robust_on": "products"})
    check({**ruled, "strategy.aggregator": "krum", "strategy.robust_on": "products"})


@pytest.mark.parametrize("name", ["flora", "florist", "flexlora"])
def test_what_averages_products_may_judge_them(name: str) -> None:
    check({**ENOUGH, "strategy.name": name, "strategy.aggregator": "multi-krum", "strategy.robust_on": "products"})


def test_simulated_ranks_and_alphas_are_within_the_bounds() -> None:
    check({"adapter.min_rank": 2, "simulation.ranks": "2,8", "simulation.alphas": "4,16"})
    check({"simulation.ranks": "8", "simulation.alphas": "16"})


def test_all_problems_are_named_at_once() -> None:
    settings = {"strategy.aggregator": "median", "strategy.robust_on": "products", "strategy.byzantine_sites": 1}
    with pytest.raises(ConfigError, match=r"no verdict.*more than half"):
        check({**settings, "rounds.min_sites": 2})


def test_a_strategy_without_a_row_goes_with_the_plain_mean_only() -> None:
    other = RunConfig().model_copy(update={"strategy": RunConfig().strategy.model_copy(update={"name": "new"})})
    check_compatibility(other)
    ruled = other.strategy.model_copy(update={"aggregator": "median"})
    with pytest.raises(ConfigError, match=r"'new' cannot be combined.*chooses its own aggregator"):
        check_compatibility(other.model_copy(update={"strategy": ruled}))


def test_the_table_names_only_what_there_is() -> None:
    keys = {key for key, _, _ in describe(RunConfig)}
    names = {f"strategy.name = {name!r}" for name in RECIPES}
    aggregators = {f"strategy.aggregator = {name!r}" for name in ["mean", *SITE_RULES, *COORDINATE_RULES]}
    adapters = {f"adapter.kind = {kind!r}" for kind in get_args(AdapterKind)}
    others = {
        "strategy.norm_bound",
        "simulation.ranks",
        "simulation.alphas",
        "rounds.buffer_size",
        "adapter.personal_rank",
    }
    assert set(REFUSALS) <= names | aggregators | adapters | others
    assert aggregators | adapters <= set(REFUSALS)
    assert set(BOUNDS) <= set(REFUSALS)
    assert {feature for row in REFUSALS.values() for feature in row} <= set(FEATURES)
    assert set(EFFECTS) <= keys


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({}, []),
        ({"strategy.trim_fraction": 0.1}, ["strategy.trim_fraction"]),
        ({"strategy.aggregator": "trimmed-mean", "strategy.trim_fraction": 0.1}, []),
        ({"strategy.aggregator": "krum", "strategy.weighting": "tokens"}, ["strategy.weighting"]),
        ({"strategy.aggregator": "geometric-median", "strategy.weighting": "tokens"}, []),
        ({"strategy.robust_on": "products"}, ["strategy.robust_on"]),
        ({"strategy.robust_on": "products", "strategy.norm_bound": "median"}, []),
        (
            {"strategy.byzantine_sites": 1, "strategy.trusted_site": "x"},
            ["strategy.byzantine_sites", "strategy.trusted_site"],
        ),
        ({"simulation.backdoor_target": "x"}, ["simulation.backdoor_target"]),
        ({"strategy.proximal_mu": 0.5}, ["strategy.proximal_mu"]),
        ({"strategy.name": "fedprox", "strategy.proximal_mu": 0.5}, []),
    ],
)
def test_settings_that_other_choices_leave_idle_are_named(settings: Mapping[str, Scalar], idle: list[str]) -> None:
    assert without_effect(read_run_config(settings)) == idle


def test_the_server_refuses_before_it_makes_a_folder_and_warns_of_idle_settings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Scalar] = {"home": str(tmp_path), "name": "x", "strategy.aggregator": "krum"}
    with pytest.raises(ConfigError, match="2f"):
        open_run(read_run_config(settings))
    assert not list(tmp_path.iterdir())
    open_run(read_run_config({**settings, **ENOUGH, "strategy.trim_fraction": 0.1}))
    assert "strategy.trim_fraction has no effect" in caplog.text


def test_a_masked_state_must_be_a_difference() -> None:
    with pytest.raises(ConfigError, match=r"transport\.downlink.*Put delta in front"):
        check({"transport.downlink": "mask:0.5|bf16"})
    check({"transport.downlink": "delta|mask:0.5|bf16"})


@pytest.mark.parametrize("key", ["uplink", "downlink"])
@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        ("foo", "unknown codec stage 'foo'; expected one of bf16"),
        ("nf4|delta", "'delta' .* cannot follow 'nf4'"),
        ("topk:0.1|nf4", "need an index coder"),
    ],
)
def test_an_impossible_pipeline_is_refused_before_anything_is_sent(key: str, pipeline: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"transport.{key} cannot be used: .*{words}"):
        check({f"transport.{key}": pipeline})
