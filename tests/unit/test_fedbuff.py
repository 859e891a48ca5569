"""Buffered asynchronous training through the whole round loop, with every arrival under the test's control."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Message as FlowerMessage
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from fedllm.messages import Failure, TrainInstruction
from fedllm.model.initial import initial_arrays
from fedllm.records import to_records
from fedllm.runs import RunFolder
from fedllm.update import Arrays
from server_app import buffered
from strategies.compatibility import check_compatibility
from tests.fake_federation import LAYOUT, Handler, InProcessGrid, LocalSite, QuadraticSite
from tests.unit.test_loop import TRANSPORTS, assert_close, events, params, run, sites

QUIET: dict[str, Any] = {
    "rounds.deadline_s": 120.0,
    "rounds.min_sites": 1,
    "evaluation.local_only": False,
    "evaluation.prompt": "",
    "evaluation.every": 1000,
    "num_rounds": 5,
}
Delay = Callable[[int, int], int]
"""Ticks that a site needs for its training, by its number and how often it was asked before."""


class TickingGrid(InProcessGrid):
    """A grid whose clock ticks when the server finds nothing to do; only training takes time on it."""

    def __init__(self, handlers: dict[int, Handler], delay: Delay) -> None:
        super().__init__(handlers)
        self.clock, self._delay, self._asked = 0, delay, dict.fromkeys(handlers, 0)
        self._ready_at: dict[str, int] = {}

    def push_messages(self, messages: Iterable[FlowerMessage]) -> list[str]:
        ids = []
        for message in messages:
            [id_] = super().push_messages([message])
            node, ticks = message.metadata.dst_node_id, 0
            if message.metadata.message_type == "train":
                ticks = self._delay(node - 100, self._asked[node])
                self._asked[node] += 1
            self._ready_at[id_] = self.clock + ticks
            ids.append(id_)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[FlowerMessage]:
        return super().pull_messages([id_ for id_ in message_ids if self._ready_at[id_] <= self.clock])

    def tick(self, seconds: float) -> None:  # noqa: ARG002 (stands for time.sleep)
        self.clock += 1


def run_ticking(home: Path, handlers: dict[int, Handler], delay: Delay, **changes: Any) -> RunFolder:
    grid = TickingGrid(handlers, delay)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffered, "time", SimpleNamespace(sleep=grid.tick))
        return run(home, grid, **{**QUIET, **changes})


def plain_fedbuff(
    members: list[QuadraticSite], delay: Delay, num_rounds: int, size: int, exponent: float
) -> tuple[Arrays, list[dict[str, int]]]:
    """The paper's server in plain float64, with a clock; returns the state and each round's staleness by site."""
    state = {name: value.astype(np.float64) for name, value in initial_arrays(LAYOUT, 42).items()}
    clock, history, tasks = 0, [], []  # a task: (version, order, site, start, ready_at)
    num_asked = dict.fromkeys(range(len(members)), 0)

    def ask(site: int, version: int) -> None:
        tasks.append((version, len(tasks), site, dict(state), clock + delay(site, num_asked[site])))
        num_asked[site] += 1

    for version in range(num_rounds):
        for site in range(len(members)):
            if all(task[2] != site for task in tasks):
                ask(site, version)
        worked, buffer = {task[2] for task in tasks if task[0] == version}, {}
        while len(buffer) < size and any(task[2] not in buffer for task in tasks):
            for task in sorted(tasks, key=lambda task: task[:2]):
                if task[4] > clock or task[2] in buffer or len(buffer) == size:
                    continue
                tasks.remove(task)
                buffer[task[2]] = task
                if task[0] < version and task[2] not in worked:
                    ask(task[2], version)
            clock += len(buffer) < size
        claims = {site: members[site].num_examples for site in buffer}
        others = {site: sum(claims.values()) - claim for site, claim in claims.items()}
        weights = {site: min(claim, others[site]) if len(claims) > 2 else claim for site, claim in claims.items()}
        for name in state:
            step = sum(
                weights[site]
                * (1 + version - task[0]) ** -exponent
                * members[site].rate
                * (members[site].optimum[name].astype(np.float64) - task[3][name])
                for site, task in buffer.items()
            )
            state[name] = state[name] + step / sum(weights.values())
        history.append({members[site].name: version - task[0] for site, task in buffer.items()})
    return {name: value.astype(np.float32) for name, value in state.items()}, history


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    st.integers(2, 5),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.lists(st.integers(0, 6), min_size=40, max_size=40),
)
def test_any_order_of_arrivals_gives_what_the_paper_says(
    num_sites: int, size: int, exponent: float, ticks: list[int]
) -> None:
    def delay(site: int, count: int) -> int:
        return ticks[(7 * site + count) % len(ticks)]

    handlers = sites(num_sites)
    members: list[Any] = list(handlers.values())
    with tempfile.TemporaryDirectory() as home:
        changes = {"rounds.buffer_size": size, "rounds.staleness_exponent": exponent, "rounds.max_staleness": 100}
        folder = run_ticking(Path(home), handlers, delay, **changes)
        expected, history = plain_fedbuff(members, delay, 5, size, exponent)
        rows = events(folder, "round")
        assert [{site: part["staleness"] for site, part in row["sites"].items()} for row in rows] == history
        found = params(folder)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)


def test_a_buffer_for_all_sites_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    one = params(run_ticking(tmp_path / "1", sites(), lambda site, _: site, **{"rounds.buffer_size": 3}))
    two = params(run(tmp_path / "2", InProcessGrid(sites()), **QUIET))
    for name, value in two.items():
        np.testing.assert_array_equal(one[name], value)


def slow_third(site: int, count: int) -> int:
    """Two sites answer at once; the third needs the time of three buffers, the first time."""
    return 100 if site == 2 and count == 0 else 0


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_nobody_waits_for_a_slow_site_whose_update_counts_when_it_comes(kind: str, tmp_path: Path) -> None:
    def delay(site: int, _: int) -> int:
        return (0, 1, 5)[site]

    handlers = sites()
    changes = {"rounds.buffer_size": 2, "transport.kind": kind, "num_rounds": 8}
    folder = run_ticking(tmp_path, handlers, delay, **changes)
    expected, history = plain_fedbuff(list(handlers.values()), delay, 8, 2, 0.5)  # type: ignore[arg-type]
    assert_close(params(folder), expected)
    late = [row["site-2"] for row in history if "site-2" in row]
    assert max(late) >= 3
    measured = [row["measurements"] for row in events(folder, "round")]
    assert max(one["staleness_max"] for one in measured) == max(late)


def test_an_update_that_is_too_late_is_dropped_and_named_and_its_site_works_on(tmp_path: Path) -> None:
    changes = {"rounds.buffer_size": 2, "rounds.max_staleness": 2, "num_rounds": 6}
    handlers = sites()
    folder = run_ticking(tmp_path, handlers, slow_third, **changes)
    rows = events(folder, "round")
    dropped = {row["round"]: reason["reason"] for row in rows for reason in row["rejected"]}
    assert dropped == {4: "asked in round 1: later than 2 rounds"}
    assert all("site-2" not in row["participants"] for row in rows)
    two = {node: site for node, site in sites().items() if node != 102}
    assert_close(params(folder), params(run(tmp_path / "2", InProcessGrid(two), **{**QUIET, "num_rounds": 6})))


def test_a_site_works_on_while_its_late_update_waits_in_the_buffer(tmp_path: Path) -> None:
    """Its next instruction says that the waiting update is taken, so that error feedback does not send it again."""
    handlers = sites()

    def delay(site: int, count: int) -> int:
        return {0: 3, 1: 0, 2: 2}[site] if count == 0 else 1 + 4 * (site == 0)

    folder = run_ticking(tmp_path, handlers, delay, **{"rounds.buffer_size": 2, "num_rounds": 6})
    for index, site in enumerate(handlers.values()):
        asked = [one for one in site.seen if isinstance(one, TrainInstruction)]  # type: ignore[union-attr]
        assert len({one.round for one in asked}) == len(asked), "a site works on a version once"
        taken = [
            row["round"] - row["sites"][f"site-{index}"]["staleness"]
            for row in events(folder, "round")
            if f"site-{index}" in row["participants"]
        ]
        for before, after in zip(asked, asked[1:], strict=False):
            assert after.last_folded == before.round
        assert [one.round for one in asked][: len(taken)] == taken


def test_lossy_uplinks_with_feedback_come_to_the_optimum_although_sites_are_late(tmp_path: Path) -> None:
    members = [LocalSite(f"site-{i}", i, tmp_path / f"site-{i}") for i in range(3)]
    for site in members:
        site.curvature = {name: np.ones_like(value) for name, value in site.curvature.items()}
        site.optimum = members[0].optimum
    handlers: dict[int, Handler] = {100 + index: site for index, site in enumerate(members)}
    changes = {"rounds.buffer_size": 2, "transport.uplink": "delta|topk:0.3|int8:8|rice", "num_rounds": 30}
    changes["strategy.server_learning_rate"] = 0.5
    folder = run_ticking(tmp_path, handlers, lambda site, _: 2 * site, **changes)
    start, end = events(folder, "evaluation")[0]["loss"], events(folder, "evaluation")[-1]["loss"]
    assert end < 0.01 * start


def test_a_buffer_that_does_not_fill_is_folded_at_the_deadline_if_the_quorum_is_there(tmp_path: Path) -> None:
    handlers: dict[int, Handler] = {**sites(2), 102: lambda message: None if is_training(message) else third(message)}
    third = sites(3)[102]
    changes = {"rounds.buffer_size": 3, "rounds.min_sites": 2, "rounds.deadline_s": 5.0, "num_rounds": 1}
    folder = run(tmp_path, InProcessGrid(handlers), **{**QUIET, **changes})
    [row] = events(folder, "round")
    assert row["participants"] == ["site-0", "site-1"]
    quick = {**changes, "rounds.deadline_s": 60.0, "rounds.grace_s": 0.5}
    folder = run(tmp_path / "grace", InProcessGrid({**handlers, **sites(2)}), **{**QUIET, **quick, "num_rounds": 1})
    [row] = events(folder, "round")
    assert row["participants"] == ["site-0", "site-1"]


def is_training(message: FlowerMessage) -> bool:
    return message.metadata.message_type == "train"


def test_what_an_attempt_in_vain_has_gathered_counts_in_the_next(tmp_path: Path) -> None:
    calls = []

    def failing_once(message: FlowerMessage) -> FlowerMessage | None:
        if is_training(message) and not calls:
            calls.append(message)
            failure = Failure(site="site-1", error="DataError", reason="the disk was full")
            return FlowerMessage(to_records(failure), reply_to=message)
        return second(message)

    handlers = sites(2)
    first, second = list(handlers.values())
    changes = {"rounds.buffer_size": 2, "rounds.min_sites": 2, "num_rounds": 1}
    folder = run_ticking(tmp_path, {100: first, 101: failing_once}, lambda site, _: site, **changes)
    assert [len(events(folder, kind)) for kind in ("attempt", "round")] == [1, 1]
    assert sum(isinstance(one, TrainInstruction) for one in first.seen) == 1  # type: ignore[union-attr]
    assert_close(params(folder), params(run(tmp_path / "2", InProcessGrid(sites(2)), **{**QUIET, "num_rounds": 1})))


def test_a_resumed_server_asks_everybody_anew_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    def delay(site: int, _: int) -> int:
        return 3 * site

    changes: dict[str, Any] = {"rounds.buffer_size": 2}
    run_ticking(tmp_path, sites(), delay, num_rounds=3, **changes)
    cut = params(RunFolder(tmp_path / "runs" / "test"))
    folder = run_ticking(tmp_path, sites(), delay, name="", resume="test", num_rounds=5, **changes)
    rows = events(folder, "round")
    assert [row["round"] for row in rows] == [1, 2, 3, 4, 5]
    assert {part["staleness"] for part in rows[3]["sites"].values()} == {0}
    members = [sites()[100], sites()[101]]
    weights = [10 / 30, 20 / 30]
    after_four = {
        name: cut[name] + 0.5 * sum(w * (s.optimum[name] - cut[name]) for w, s in zip(weights, members, strict=True))  # type: ignore[union-attr]
        for name in cut
    }
    assert sorted(rows[3]["participants"]) == ["site-0", "site-1"]
    assert_close(load_file(folder.checkpoints / "round-00004" / "params.safetensors"), after_four)


def test_between_rounds_only_free_sites_are_evaluated_and_all_of_them_at_the_end(tmp_path: Path) -> None:
    changes = {"rounds.buffer_size": 2, "evaluation.every": 1, "num_rounds": 3}
    folder = run_ticking(tmp_path, sites(), lambda site, _: 50 * (site == 2), **changes)
    evaluated = [sorted(event["sites"]) for event in events(folder, "evaluation")]
    everybody, free = ["site-0", "site-1", "site-2"], ["site-0", "site-1"]
    assert evaluated == [everybody, free, free, everybody]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"strategy": {"name": "scaffold"}}, "start together"),
        ({"strategy": {"name": "rolora"}}, "whose turn it"),
        ({"strategy": {"name": "fedrot"}}, "not the same for all"),
        ({"strategy": {"name": "clustered"}}, "groups are found"),
        ({"strategy": {"name": "flora"}}, "replaced since"),
        ({"strategy": {"aggregator": "multi-krum"}}, "late ones for lies"),
        ({"rounds": {"fraction": 0.5}}, "kept at work"),
        ({"rounds": {"min_sites": 5}}, "fewer updates than the quorum"),
    ],
)
def test_what_makes_no_sense_with_a_buffer_is_refused(changes: dict[str, Any], reason: str) -> None:
    config = RunConfig.model_validate({**changes, "rounds": {"buffer_size": 4, **changes.get("rounds", {})}})
    with pytest.raises(ConfigError, match=reason):
        check_compatibility(config)


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "ffa-lora", "fedsa-lora", "fedper"])
def test_strategies_that_average_can_be_buffered(name: str) -> None:
    check_compatibility(RunConfig.model_validate({"strategy": {"name": name}, "rounds": {"buffer_size": 4}}))
