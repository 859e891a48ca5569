"""FedProx and SCAFFOLD through the whole round loop against float64 pseudocode of the papers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fedllm.model.export import load_peft_adapter
from fedllm.model.initial import initial_arrays
from fedllm.update import Arrays
from fedllm.work import control_name
from tests.fake_federation import LAYOUT, Handler, InProcessGrid, LocalSite
from tests.unit.test_loop import TRANSPORTS, events, params, run

Vector = NDArray[np.float64]
Gradient = Callable[[Vector, str], Vector]
COUNT = 4


def members(folder: Path, count: int = COUNT, **settings: Any) -> list[LocalSite]:
    return [LocalSite(f"site-{i}", i, folder / f"site-{i}", 10 * (i + 1), **settings) for i in range(count)]


def run_with(home: Path, strategy: str, sites: list[LocalSite], **changes: Any) -> Any:
    handlers: dict[int, Handler] = {100 + index: site for index, site in enumerate(sites)}
    quiet = {"evaluation.local_only": False, "evaluation.prompt": ""}
    return run(home, InProcessGrid(handlers), **{"strategy.name": strategy, **quiet, **changes})


def start() -> dict[str, Vector]:
    return {name: value.astype(np.float64) for name, value in initial_arrays(LAYOUT, 42).items()}


def gradient(site: LocalSite, at: Vector, name: str) -> Vector:
    return site.curvature[name] * (at - site.optimum[name].astype(np.float64))


def fedprox_pseudocode(sites: list[LocalSite], num_rounds: int, mu: float) -> dict[str, Vector]:
    """Algorithm 2 of arXiv 1812.06127 with gradient steps as the local solver."""
    weights = np.array([site.num_examples for site in sites]) / sum(site.num_examples for site in sites)
    state = start()
    for _ in range(num_rounds):
        for name in state:
            results = []
            for site in sites:
                local = state[name].copy()
                for _ in range(site.num_steps):
                    local -= site.step_size * (gradient(site, local, name) + mu * (local - state[name]))
                results.append(local)
            state[name] = sum(w * local for w, local in zip(weights, results, strict=True))
    return state


def scaffold_pseudocode(
    sites: list[LocalSite], participants: list[list[str]]
) -> tuple[dict[str, Vector], dict[str, Vector]]:
    """Algorithm 1 of arXiv 1910.06378, option II, with the mean over sites weighted by examples."""
    state, common = start(), {name: np.zeros_like(value) for name, value in start().items()}
    own = {site.name: {name: np.zeros_like(value) for name, value in state.items()} for site in sites}
    for names in participants:
        chosen = [site for site in sites if site.name in names]
        weights = np.array([site.num_examples for site in chosen]) / sum(site.num_examples for site in chosen)
        for name in state:
            moves, changes = [], []
            for site in chosen:
                local = state[name].copy()
                for _ in range(site.num_steps):
                    local -= site.step_size * (gradient(site, local, name) - own[site.name][name] + common[name])
                new = own[site.name][name] - common[name] + (state[name] - local) / (site.num_steps * site.step_size)
                moves.append(local - state[name])
                changes.append(new - own[site.name][name])
                own[site.name][name] = new
            state[name] = state[name] + sum(w * move for w, move in zip(weights, moves, strict=True))
            mean_change = sum(w * change for w, change in zip(weights, changes, strict=True))
            common[name] = common[name] + len(chosen) / len(sites) * mean_change
    return state, common


def optimum(sites: list[LocalSite]) -> dict[str, Vector]:
    """Return where the weighted sum of all objectives is least."""
    top = {
        n: sum(s.num_examples * s.curvature[n] * s.optimum[n].astype(np.float64) for s in sites) for n in LAYOUT.names
    }
    return {name: top[name] / sum(s.num_examples * s.curvature[name] for s in sites) for name in LAYOUT.names}


def distance(found: Arrays, to: dict[str, Vector]) -> float:
    return float(np.sqrt(sum(np.sum((found[name] - to[name]) ** 2) for name in to)))


def assert_equal(one: Arrays, two: Arrays) -> None:
    for name, value in one.items():
        np.testing.assert_array_equal(two[name], value)


@pytest.mark.parametrize("mu", [0.0, 0.01, 1.5])
def test_fedprox_follows_the_papers_algorithm(mu: float, tmp_path: Path) -> None:
    sites = members(tmp_path)
    folder = run_with(tmp_path, "fedprox", sites, **{"strategy.proximal_mu": mu, "num_rounds": 4})
    for name, value in fedprox_pseudocode(sites, 4, mu).items():
        np.testing.assert_allclose(params(folder)[name], value, rtol=1e-5, atol=1e-6)


def test_fedprox_without_mu_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    one = run_with(tmp_path / "1", "fedprox", members(tmp_path / "1"), **{"strategy.proximal_mu": 0.0})
    two = run_with(tmp_path / "2", "fedavg", members(tmp_path / "2"))
    assert_equal(params(one), params(two))


@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_scaffold_follows_the_papers_algorithm(fraction: float, kind: str, tmp_path: Path) -> None:
    sites = members(tmp_path)
    changes = {"rounds.fraction": fraction, "num_rounds": 6, "transport.kind": kind}
    folder = run_with(tmp_path, "scaffold", sites, **changes)
    participants = [event["participants"] for event in events(folder, "round")]
    assert {len(names) for names in participants} == {round(COUNT * fraction)}
    state, common = scaffold_pseudocode(sites, participants)
    for name in LAYOUT.names:
        np.testing.assert_allclose(params(folder)[name], state[name], rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(params(folder)[control_name(name)], common[name], rtol=1e-4, atol=1e-5)


def test_the_first_round_of_scaffold_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    one = params(run_with(tmp_path / "1", "scaffold", members(tmp_path / "1"), num_rounds=1))
    two = params(run_with(tmp_path / "2", "fedavg", members(tmp_path / "2"), num_rounds=1))
    assert_equal(two, {name: one[name] for name in two})


@pytest.mark.parametrize("uplink", ["fp32", "delta|int8:8"])
def test_scaffold_reaches_the_optimum_where_fedavg_stops_beside_it(uplink: str, tmp_path: Path) -> None:
    settings = {"num_rounds": 25, "evaluation.every": 25, "transport.uplink": uplink}
    found = {}
    for strategy in ("fedavg", "scaffold"):
        sites = members(tmp_path / strategy, num_steps=10)
        found[strategy] = params(run_with(tmp_path / strategy, strategy, sites, **settings))
    best = optimum(members(tmp_path))
    assert distance(found["fedavg"], best) > 0.2
    assert distance(found["scaffold"], best) < 0.01 * distance(found["fedavg"], best)


def test_scaffold_doubles_the_traffic_and_leaves_it_out_of_the_export(tmp_path: Path) -> None:
    one = run_with(tmp_path / "1", "scaffold", members(tmp_path / "1"))
    two = run_with(tmp_path / "2", "fedavg", members(tmp_path / "2"))
    up = [[event["bytes_up"] for event in events(folder, "round")] for folder in (one, two)]
    row, values = 16, LAYOUT.num_bytes
    assert up[0] == [number + COUNT * (values + 2 * row) for number in up[1]]
    assert load_peft_adapter(one.adapter).keys() == set(LAYOUT.names)


@pytest.mark.parametrize("uplink", ["fp32", "delta|int8:8", "delta|topk:0.2|fp32|rice"])
def test_a_resumed_scaffold_gives_the_same_bits(uplink: str, tmp_path: Path) -> None:
    """The server goes back two rounds that the sites have done already; c and every c_k follow."""
    changes = {"transport.uplink": uplink, "keep_checkpoints": 9, "rounds.fraction": 0.5}
    clean = run_with(tmp_path / "clean", "scaffold", members(tmp_path / "clean"), num_rounds=6, **changes)
    cut = run_with(tmp_path / "cut", "scaffold", members(tmp_path / "cut"), num_rounds=5, **changes)
    for late in ("round-00004", "round-00005"):
        for path in (cut.checkpoints / late).iterdir():
            path.unlink()
        (cut.checkpoints / late).rmdir()
    more = {"num_rounds": 6, "name": "", "resume": "test", **changes}
    folder = run_with(tmp_path / "cut", "scaffold", members(tmp_path / "cut"), **more)
    assert_equal(params(clean), params(folder))


def test_control_variates_stay_the_mean_of_the_sites_own_whatever_is_lost(tmp_path: Path) -> None:
    """Lossy updates, partial rounds and a rejected update: c is still the mean of what the sites keep."""

    class Unlucky(LocalSite):
        def train(self, instruction: Any, envelope: Any) -> Any:
            report, back = super().train(instruction, envelope)
            return (report.model_copy(update={"round": 99}), back) if instruction.round in (2, 3) else (report, back)

    sites = [*members(tmp_path, 3), Unlucky("site-3", 3, tmp_path / "site-3", 10)]
    for site in sites:
        site.num_examples = 10
    folder = run_with(tmp_path, "scaffold", sites, num_rounds=5, **{"transport.uplink": "delta|int4:8"})
    assert [len(event["rejected"]) for event in events(folder, "round")] == [0, 1, 1, 0, 0]
    kept = [load_file(next(site.folder.glob("round-00005.kept-*"))) for site in sites]
    for name in map(control_name, LAYOUT.names):
        mean = np.mean([own[name].astype(np.float64) for own in kept], axis=0)
        np.testing.assert_allclose(params(folder)[name], mean, rtol=1e-5, atol=1e-6)


def test_a_site_that_lost_its_control_variates_starts_over_and_says_so(tmp_path: Path) -> None:
    sites = members(tmp_path)
    run_with(tmp_path, "scaffold", sites, num_rounds=2)
    for path in sites[0].folder.glob("*.kept-*"):
        path.unlink()
    folder = run_with(tmp_path, "scaffold", members(tmp_path), name="", resume="test", num_rounds=3)
    rows = events(folder, "round")[-1]["sites"]
    assert "starts over" in rows["site-0"]["note"]
    assert rows["site-1"]["note"] == ""
