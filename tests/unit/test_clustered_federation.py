"""A clustered federation through the whole round loop: planted groups are found, and each is a federation of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm import rng
from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from fedllm.model.export import load_peft_adapter
from fedllm.model.initial import initial_arrays
from fedllm.runs import RunFolder
from fedllm.update import Arrays
from server_app.checkpoint import RunState, load_latest
from server_app.events import read_events
from server_app.results import Results
from strategies.compatibility import check_compatibility
from strategies.registry import build_strategy
from tests.fake_federation import LAYOUT, Handler, InProcessGrid, LocalSite
from tests.unit.test_loop import TRANSPORTS, assert_close, events, run

A, B = LAYOUT.names
QUIET = {
    "strategy.name": "clustered",
    "rounds.deadline_s": 120.0,
    "evaluation.local_only": False,
    "evaluation.prompt": "",
    "num_rounds": 4,
}
LOSSY = {
    "transport.uplink": "delta|int8:8",
    "transport.downlink": "delta|int8:8",
    "strategy.server_optimizer": "adam",
    "strategy.server_learning_rate": 0.3,
}
PLANTED = [1, 0, 1, 0, 1]


def members(home: Path, planted: list[int] = PLANTED) -> list[LocalSite]:
    """Return sites that want nearly the same as the others of their planted group."""
    sites = [LocalSite(f"site-{i}", i, home / f"site-{i}", 10 * (i + 1)) for i in range(len(planted))]
    for site, group in zip(sites, planted, strict=True):
        centre = rng.generator(group, purpose="centre")
        site.optimum = {
            spec.name: (centre.standard_normal(spec.shape) + 0.2 * site.optimum[spec.name]).astype(np.float32)
            for spec in LAYOUT.tensors
        }
        site.curvature = {spec.name: np.ones(spec.shape, np.float32) for spec in LAYOUT.tensors}
    return sites


def grid(sites: list[LocalSite]) -> InProcessGrid:
    handlers: dict[int, Handler] = {100 + index: site for index, site in enumerate(sites)}
    return InProcessGrid(handlers)


def run_with(home: Path, sites: list[LocalSite] | None = None, **changes: Any) -> RunFolder:
    return run(home, grid(sites or members(home)), **{**QUIET, **changes})


def last_state(folder: RunFolder) -> RunState:
    state = load_latest(folder.checkpoints)
    assert state is not None
    return state


def alone(home: Path, group: int, num_rounds: int) -> Arrays:
    """Plain float64: the federation of one planted group, in which no site outweighs the others together."""
    sites = [site for site, planted in zip(members(home), PLANTED, strict=True) if planted == group]
    for site in sites:
        site.rate = 1 - (1 - site.step_size) ** site.num_steps
    state = {name: value.astype(np.float64) for name, value in initial_arrays(LAYOUT, 42).items()}
    whole = sum(site.num_examples for site in sites)
    weights = [min(site.num_examples, whole - site.num_examples if len(sites) > 2 else whole) for site in sites]
    for _ in range(num_rounds):
        for name in state:
            rows = zip(weights, sites, strict=True)
            mean = sum(weight / sum(weights) * site.optimum[name].astype(np.float64) for weight, site in rows)
            state[name] = state[name] + sites[0].rate * (mean - state[name])
    return {name: value.astype(np.float32) for name, value in state.items()}


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_planted_groups_are_found_and_each_is_a_federation_of_its_own(kind: str, tmp_path: Path) -> None:
    folder = run_with(tmp_path, **{"transport.kind": kind})
    state = last_state(folder)
    assert state.groups == {"site-0": 0, "site-1": 1, "site-2": 0, "site-3": 1, "site-4": 0}
    assert_close(state.branches[0].params, alone(tmp_path, 1, 4))
    assert_close(state.branches[1].params, alone(tmp_path, 0, 4))
    [event] = events(folder, "groups")
    assert (event["round"], event["groups"]) == (1, state.groups)
    assert event["silhouette"] > 0.5


def test_every_site_is_evaluated_and_reported_with_its_groups_adapter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    sites = members(tmp_path)
    folder = run_with(tmp_path, sites, **{"evaluation.personal_steps": 0})
    state = last_state(folder)
    rows = events(folder, "evaluation")[-1]["sites"]
    for site in sites:
        assert rows[site.name]["loss"] == pytest.approx(site.score(state.of(site.name).params).loss, rel=1e-6)
    for branch, name in ((state.branches[0], "adapter"), (state.branches[1], "adapter-group-1")):
        assert_close(load_peft_adapter(folder.path / name), branch.params)
    assert (folder.path / "best-group-1").is_dir()
    assert Results.of(read_events(folder.metrics)).groups is not None
    page = folder.report.read_text()
    assert ">group<" in page
    assert "2 stand out (silhouette" in caplog.text


def test_groups_serve_their_sites_better_than_one_adapter_for_all(tmp_path: Path) -> None:
    grouped = events(run_with(tmp_path / "1"), "evaluation")[-1]
    together = events(run_with(tmp_path / "2", **{"strategy.name": "fedavg"}), "evaluation")[-1]
    for site, row in grouped["sites"].items():
        assert row["loss"] < 0.5 * together["sites"][site]["loss"]


def test_where_no_groups_stand_out_it_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    def strangers(home: Path) -> list[LocalSite]:
        return [LocalSite(f"site-{i}", i, home / f"site-{i}") for i in range(3)]

    one = last_state(run_with(tmp_path / "1", strangers(tmp_path / "1")))
    two = last_state(run_with(tmp_path / "2", strangers(tmp_path / "2"), **{"strategy.name": "fedavg"}))
    assert set(one.groups.values()) == {0}
    assert one.others == ()
    for name, value in two.params.items():
        np.testing.assert_array_equal(one.params[name], value)


def test_groups_can_be_found_later_from_what_sites_then_want(tmp_path: Path) -> None:
    folder = run_with(tmp_path, **{"strategy.grouping_round": 3})
    state = last_state(folder)
    assert [event["round"] for event in events(folder, "groups")] == [3]
    assert [state.groups[f"site-{i}"] for i in range(5)] == [0, 1, 0, 1, 0]
    assert events(folder, "round")[1]["measurements"].keys() == {"delta_norm"}


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize("changes", [{}, LOSSY], ids=["plain", "lossy-adam"])
def test_a_resumed_run_gives_the_same_bits_in_every_group(changes: Any, stop: int, tmp_path: Path) -> None:
    expected = last_state(run_with(tmp_path / "whole", num_rounds=5, **changes))
    run_with(tmp_path / "cut", num_rounds=stop, **changes)
    folder = run_with(tmp_path / "cut", name="", resume="test", num_rounds=5, **changes)
    found = last_state(folder)
    assert found.groups == expected.groups
    assert len(found.branches) == 2
    for ours, theirs in zip(found.branches, expected.branches, strict=True):
        assert (ours.group, ours.optimizer.step) == (theirs.group, theirs.optimizer.step)
        for arrays, others in ((ours.params, theirs.params), (ours.sent, theirs.sent)):
            for name, value in others.items():
                np.testing.assert_array_equal(arrays[name], value)
    assert len(events(folder, "groups")) == 1


def test_a_crash_before_the_checkpoint_finds_the_groups_once_more(tmp_path: Path) -> None:
    expected = last_state(run_with(tmp_path / "whole", keep_checkpoints=9))
    folder = run_with(tmp_path / "cut", num_rounds=2, keep_checkpoints=9)
    for name in ("round-00001", "round-00002"):
        shutil.rmtree(folder.checkpoints / name)
    folder = run_with(tmp_path / "cut", name="", resume="test", num_rounds=4)
    assert len(events(folder, "groups")) == 1
    for ours, theirs in zip(last_state(folder).branches, expected.branches, strict=True):
        for name, value in theirs.params.items():
            np.testing.assert_array_equal(ours.params[name], value)


def test_a_group_none_of_whose_sites_answers_stays_where_it_is(tmp_path: Path) -> None:
    run_with(tmp_path, num_rounds=2)
    sites = members(tmp_path)
    before = last_state(RunFolder(tmp_path / "runs" / "test"))
    present = [site for site, group in zip(sites, PLANTED, strict=True) if group == 1]
    folder = run_with(tmp_path, present, name="", resume="test", num_rounds=3)
    after = last_state(folder)
    for name, value in before.branches[1].params.items():
        np.testing.assert_array_equal(after.branches[1].params[name], value)
    assert not np.array_equal(after.params[B], before.params[B])
    again = last_state(run_with(tmp_path, members(tmp_path), name="", resume="test", num_rounds=4))
    assert_close(again.branches[1].params, alone(tmp_path, 0, 3))


def test_a_site_that_joins_later_takes_part_in_the_largest_group(tmp_path: Path) -> None:
    run_with(tmp_path, num_rounds=2)
    late = LocalSite("site-late", 7, tmp_path / "late")
    folder = run_with(tmp_path, [*members(tmp_path), late], name="", resume="test", num_rounds=3)
    state = last_state(folder)
    assert "site-late" not in state.groups
    assert events(folder, "evaluation")[-1]["sites"]["site-late"]["loss"] == pytest.approx(
        late.score(state.params).loss, rel=1e-6
    )
    assert_close(state.branches[1].params, alone(tmp_path, 0, 3))


def test_an_old_checkpoint_has_one_group(tmp_path: Path) -> None:
    folder = run_with(tmp_path, **{"strategy.name": "fedavg"})
    [*_, newest] = sorted(folder.checkpoints.iterdir())
    document = json.loads((newest / "state.json").read_text())
    del document["groups"], document["others"]
    (newest / "state.json").write_text(json.dumps(document))
    state = last_state(folder)
    assert (state.groups, state.others, state.of("anyone")) == ({}, (), state)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"strategy": {"aggregator": "median"}}, "a group can be small"),
        ({"rounds": {"fraction": 0.5}}, "finds the groups"),
        ({"adapter": {"kind": "prompt"}}, "two factors"),
        ({"transport": {"uplink": "delta|segment:2|int8:64"}}, "different parts of B"),
        ({"strategy": {"grouping_round": 9}}, "after the last round"),
    ],
)
def test_what_groups_cannot_go_with_is_refused(changes: dict[str, Any], reason: str) -> None:
    changes = {**changes, "strategy": {"name": "clustered", **changes.get("strategy", {})}}
    config = RunConfig.model_validate(changes)
    build_strategy(config)
    with pytest.raises(ConfigError, match=reason):
        check_compatibility(config)
