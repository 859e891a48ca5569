"""What every strategy promises of its aggregate, through the real server loop and real sites on a 4-bit base.

After a round, what each site applies beside its base is compared with the weighted mean of what the sites applied at the
end of their training: `sum_k p_k s_k B_k A_k` multiplied out in float64, with everything read from PEFT's own layers.
Strategies that claim exactness agree to float32; of the others the error is what they measured themselves, where they do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm.config import RunConfig, read_run_config
from fedllm.runs import RunFolder
from server_app.app import open_run, run_federation
from strategies.registry import RECIPES, build_strategy
from tests.fake_federation import InProcessGrid
from tests.observed_sites import ObservedSite, Update, observed_sites
from tests.site_handlers import TINY, make_home

MIXTURES: dict[str, dict[str, Any]] = {
    "equal": {},
    "mixed ranks": {"adapter.min_rank": 1, "simulation.ranks": "4,1,3"},
    "mixed alphas": {"adapter.min_rank": 4, "simulation.alphas": "8,3,20"},
    "all mixed": {
        "adapter.rslora": True,
        "adapter.min_rank": 1,
        "simulation.ranks": "2,4,3",
        "simulation.alphas": "4,2,7",
    },
}


@dataclass(frozen=True)
class Outcome:
    """A run of two rounds, interrupted between them."""

    folder: RunFolder
    sites: list[ObservedSite]

    shares: tuple[float, ...] = ()

    def ideal(self, round_: int) -> Update:
        """Return the weighted mean of what the sites applied at the end of their training, by examples or by `shares`."""
        rows = [site.trained[round_] for site in self.sites]
        whole = sum(weight for weight, _ in rows)
        shares = self.shares or tuple(weight / whole for weight, _ in rows)
        return {
            layer: np.asarray(sum(share * applied[layer] for share, (_, applied) in zip(shares, rows, strict=True)))
            for layer in rows[0][1]
        }

    def errors(self, round_: int) -> list[float]:
        """Return by site how far what it applies after a round is from the ideal, relatively, over all layers."""
        ideal = self.ideal(round_)
        size = _norm(ideal)
        found = [site.evaluated[round_] for site in self.sites]
        return [_norm({layer: one[layer] - ideal[layer] for layer in ideal}) / size for one in found]

    def measurements(self, round_: int) -> Mapping[str, float]:
        """Return what the aggregator measured."""
        rows = [json.loads(line) for line in self.folder.metrics.read_text().splitlines()]
        [event] = [row for row in rows if row["event"] == "round" and row["round"] == round_]
        measured: Mapping[str, float] = event["measurements"]
        return measured


def _norm(update: Update) -> float:
    return float(np.sqrt(sum(np.sum(value**2) for value in update.values())))


SETTINGS: dict[str, Any] = {
    **TINY,
    "seed": 3,
    "adapter.rank": 4,
    "adapter.alpha": 8.0,
    "adapter.target_modules": "q_proj,v_proj",
    "data.max_length": 32,
    "data.max_holdout_examples": 1,
    "simulation.partitioner": "quantity",
    "train.learning_rate": 0.02,
    "train.schedule": "constant",
    "train.warmup_fraction": 0.0,
    "rounds.max_attempts": 1,
    "rounds.deadline_s": 600.0,
    "evaluation.local_only": False,
    "evaluation.prompt": "",
    "strategy.max_weight_share": 1.0,
    "transport.uplink": "fp32",
    "transport.downlink": "fp32",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLLM_CACHE", str(folder / "cache"))
        yield make_home(folder, 64)


def run_twice(home: Path, **changes: Any) -> Outcome:
    """Run one round, stop, and resume for a second one from the checkpoint."""
    name, sites = f"run-{len(list(home.glob('runs/*')))}", observed_sites()
    settings: dict[str, Any] = {**SETTINGS, "home": str(home), **changes}
    moments: tuple[dict[str, Any], ...] = ({"num_rounds": 1, "name": name}, {"num_rounds": 2, "resume": name})
    for given in moments:
        run, config, state = open_run(read_run_config({**settings, **given}))
        run_federation(InProcessGrid(dict(sites)), run, config, state, run_id=1, fixed_sites=True)
    assert not [failure for site in sites.values() for failure in site.failures]
    return Outcome(run, list(sites.values()))


def _claims_exactness(name: str) -> bool:
    return build_strategy(RunConfig.model_validate({"strategy": {"name": name}})).is_exact


EXACT = sorted(name for name in RECIPES if _claims_exactness(name))
ONE_RANK = ("ravan",)
CASES = [
    (name, mixture)
    for name in EXACT
    for mixture in MIXTURES
    if mixture == "equal" or name == "flora" or (mixture == "all mixed" and name not in ONE_RANK)
]


@pytest.mark.parametrize(("name", "mixture"), CASES)
def test_what_sites_apply_is_the_weighted_mean_of_what_they_applied(name: str, mixture: str, home: Path) -> None:
    outcome = run_twice(home, **{"strategy.name": name, **MIXTURES[mixture]})
    for round_ in (1, 2):
        assert max(outcome.errors(round_)) <= 1e-6
        assert _norm(outcome.ideal(round_)) > 0.05, "the sites learned something"
        assert outcome.measurements(round_).get("discarded_energy", 0.0) < 1e-20
    first, second, _ = (site.trained[1][1] for site in outcome.sites)
    assert _norm({layer: first[layer] - second[layer] for layer in first}) > 0.01, "the sites learned different things"


@pytest.mark.parametrize("name", ["fedex", "ffa-lora"])
def test_weights_that_are_held_to_a_bound_are_those_of_the_ideal(name: str, home: Path) -> None:
    """Three sites have about one, two and three sixths of the examples; none may count more than two fifths."""
    found = run_twice(home, **{"strategy.name": name, "strategy.max_weight_share": 0.4})
    outcome = replace(found, shares=(0.2, 0.4, 0.4))
    for round_ in (1, 2):
        assert max(outcome.errors(round_)) <= 1e-6
        assert max(found.errors(round_)) > 1e-3, "by the examples alone it is another mean"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("flexlora", {}),
        ("lora-fair", {}),
        ("florist", {"strategy.lossless": False, "strategy.energy_threshold": 0.8}),
        ("flora", {"adapter.side_rank": 3}),
        ("fedex", {"adapter.side_rank": 1}),
    ],
)
def test_an_approximate_aggregate_errs_by_what_it_says_it_discarded(
    name: str, changes: dict[str, Any], home: Path
) -> None:
    outcome = run_twice(home, **{"strategy.name": name, **MIXTURES["mixed ranks"], **changes})
    for round_ in (1, 2):
        law = np.sqrt(outcome.measurements(round_)["discarded_energy"])
        assert law > 1e-3
        assert outcome.errors(round_) == pytest.approx([law] * 3, rel=1e-3)


def test_fed_sb_loses_in_the_first_round_what_its_rank_leaves_out_and_is_exact_from_then_on(home: Path) -> None:
    outcome = run_twice(home, **{"strategy.name": "fed-sb"})
    law = np.sqrt(outcome.measurements(1)["discarded_energy"])
    assert law > 1e-3
    assert outcome.errors(1) == pytest.approx([law] * 3, rel=1e-3)
    assert max(outcome.errors(2)) <= 1e-6
    before, after = outcome.sites[0].evaluated[1], outcome.ideal(2)
    assert _norm({layer: after[layer] - before[layer] for layer in after}) > 1e-3 * _norm(after), "M learns"


def test_an_average_of_factors_is_not_exact_and_padding_is_worse(home: Path) -> None:
    errors = {
        name: run_twice(home, **{"strategy.name": name, **MIXTURES["mixed ranks"]}).errors(1)
        for name in ("fedavg", "zero-padding")
    }
    assert 1e-3 < max(errors["fedavg"]) < max(errors["zero-padding"]) < 1


@pytest.mark.parametrize("name", ["flora", "fedex", "florist"])
def test_a_lossy_downlink_delays_and_does_not_lose(name: str, home: Path) -> None:
    """What the downlink drops stays in the server's state: the product that it exports stays near the ideal."""
    lossy = {"transport.downlink": "delta|int8:256", "transport.uplink": "int8:256", **MIXTURES["mixed ranks"]}
    outcome = run_twice(home, **{"strategy.name": name, **lossy})
    assert max(outcome.errors(1)) < 0.05
    assert max(outcome.errors(2)) < 0.05
