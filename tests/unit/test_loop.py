"""The round loop with sites that answer, lie, fail, or stay silent."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message as FlowerMessage

from fedllm.agreement import Agreement
from fedllm.config import RunConfig, read_run_config
from fedllm.errors import ConfigError, QuorumError
from fedllm.messages import AnyMessage, Failure, TrainInstruction
from fedllm.model.export import load_peft_adapter
from fedllm.model.initial import initial_arrays
from fedllm.runs import RunFolder
from fedllm.update import Arrays
from fedllm.wire.transport import Envelope
from server_app.app import open_run, run_federation
from server_app.checkpoint import load_latest
from tests.fake_federation import (
    AGREEMENT,
    LAYOUT,
    Handler,
    InProcessGrid,
    QuadraticSite,
    empty_reply,
    flower_error,
)

SETTINGS = {
    "name": "test",
    "rounds.deadline_s": 60.0,
    "rounds.join_timeout_s": 60.0,
    "rounds.min_sites": 2,
    "rounds.max_attempts": 2,
    "train.local_steps": 2,
    "transport.kind": "flower",
    "transport.uplink": "fp32",
    "transport.downlink": "fp32",
}


def run(home: Path, grid: InProcessGrid, *, fixed_sites: bool = True, **changes: Any) -> RunFolder:
    """Run a federation to its end, as the ServerApp does."""
    config = read_run_config({**SETTINGS, "home": str(home), **changes})
    folder, effective, state = open_run(config)
    run_federation(grid, folder, effective, state, run_id=1, fixed_sites=fixed_sites)
    return folder


def sites(count: int = 3) -> dict[int, Handler]:
    return {100 + index: QuadraticSite(f"site-{index}", index, 10 * (index + 1)) for index in range(count)}


def events(folder: RunFolder, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


def params(folder: RunFolder) -> Arrays:
    state = load_latest(folder.checkpoints)
    assert state is not None
    return state.params


def expected_params(members: list[QuadraticSite], num_rounds: int) -> Arrays:
    """FedAvg in plain float64: every round moves half-way to the weighted mean of the optima."""
    total = sum(site.num_examples for site in members)
    state = {name: value.astype(np.float64) for name, value in initial_arrays(LAYOUT, 42).items()}
    for _ in range(num_rounds):
        for name in state:
            mean = sum(site.num_examples / total * site.optimum[name].astype(np.float64) for site in members)
            state[name] = state[name] + 0.5 * (mean - state[name])
    return {name: value.astype(np.float32) for name, value in state.items()}


def assert_close(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)


def test_a_run_gives_plain_fedavg_and_everything_that_is_promised(tmp_path: Path) -> None:
    handlers = sites()
    folder = run(tmp_path, InProcessGrid(handlers))
    expected = expected_params(list(handlers.values()), 3)  # type: ignore[arg-type]
    assert_close(params(folder), expected)
    assert_close(load_peft_adapter(folder.adapter), expected)
    assert [event["round"] for event in events(folder, "evaluation")] == [0, 1, 2, 3]
    assert [event["round"] for event in events(folder, "round")] == [1, 2, 3]
    assert events(folder, "local_only")[0]["sites"].keys() == {"site-0", "site-1", "site-2"}
    assert events(folder, "answer")[0]["federated"] == "after"
    assert events(folder, "end")[0]["status"] == "finished"
    assert folder.report.is_file()
    assert not (folder.path / "spool").exists()
    manifest = json.loads(folder.manifest.read_text())
    assert manifest["base_fingerprint"] == AGREEMENT.base
    assert manifest["sites"]["site-2"]["train_examples"] == 30


def test_the_best_round_is_kept_not_the_last(tmp_path: Path) -> None:
    """The first round goes nearly all the way; the momentum then overshoots."""
    changes = {"strategy.server_learning_rate": 1.9, "strategy.server_momentum": 0.9}
    folder = run(tmp_path, InProcessGrid(sites()), **changes)
    losses = [event["loss"] for event in events(folder, "evaluation")]
    assert losses[1] < losses[0]
    assert losses[3] > losses[1]
    assert events(folder, "end")[0]["best_round"] == 1
    best, last = load_peft_adapter(folder.best), load_peft_adapter(folder.adapter)
    assert any(not np.array_equal(best[name], last[name]) for name in best)


def test_equal_seeds_give_equal_bits(tmp_path: Path) -> None:
    one = params(run(tmp_path / "1", InProcessGrid(sites())))
    grid = InProcessGrid(dict(reversed(sites().items())))
    grid.delays = {100: 0.3, 101: 0.1}
    two = params(run(tmp_path / "2", grid))
    for name, value in one.items():
        np.testing.assert_array_equal(two[name], value)


class Liar(QuadraticSite):
    """A site that greets like any other and then misbehaves in training."""

    def __init__(self, how: str) -> None:
        super().__init__("site-9", 9)
        self.how = how

    def __call__(self, message: FlowerMessage) -> FlowerMessage | None:
        if message.metadata.message_type == "train":
            special: dict[str, Callable[[], FlowerMessage | None]] = {
                "silent": lambda: None,
                "dead": lambda: flower_error(message),
                "empty": lambda: empty_reply(message),
            }
            if self.how in special:
                return special[self.how]()
        return super().__call__(message)

    def train(self, instruction: TrainInstruction, envelope: Envelope) -> tuple[AnyMessage, Envelope | None]:
        state = self.fetch(instruction, envelope)
        delta = {name: np.full_like(value, 1e3) for name, value in state.items()}
        report = self.report(instruction, state)
        if self.how == "refuses":
            return Failure(site=self.name, error="DataError", reason="no data today"), None
        if self.how == "nothing":
            return report, None
        if self.how == "other-name":
            return self.report(instruction, state, site="site-0"), self.push(instruction, envelope, delta)
        if self.how == "other-round":
            return report, self.push(instruction, envelope, delta, round_=instruction.round + 1)
        if self.how == "other-base":
            return report, self.push(instruction, envelope, delta, base="0" * 64)
        if self.how == "other-reference":
            return report, self.push(instruction, envelope, delta, reference_id="0" * 32)
        pushed = self.push(instruction, envelope, delta)
        assert pushed.blob is not None
        blob = bytearray(pushed.blob)
        if self.how == "nan":
            at = blob.rfind(np.float32(1e3).tobytes())
            blob[at : at + 4] = np.float32(np.nan).tobytes()
        elif self.how == "flipped":
            blob[-3] ^= 1
        elif self.how == "cut":
            blob = blob[:-10]
        elif self.how == "longer":
            blob += b"\0" * 100_000
        return report, honest_envelope(bytes(blob))


def honest_envelope(blob: bytes) -> Envelope:
    """Return an envelope whose size and checksum fit a blob, so that only the payload itself is wrong."""
    from fedllm.wire.digest import digest_bytes

    return Envelope({"transport": "flower", "size": len(blob), "digest": digest_bytes(blob)}, blob)


REASONS = {
    "silent": "no reply",
    "dead": "FlowerError",
    "empty": "no fedllm record",
    "refuses": "no data today",
    "nothing": "Payload|Transport",
    "other-name": "not for this request",
    "other-round": "another round",
    "other-base": "another base",
    "other-reference": "another reference",
    "nan": "Corrupt|NonFinite",
    "flipped": "CorruptPayloadError",
    "cut": "TruncatedPayloadError",
    "longer": "OversizedPayloadError",
}


@pytest.mark.parametrize("how", REASONS)
def test_a_bad_reply_is_named_and_changes_no_bit(how: str, tmp_path: Path) -> None:
    honest = {**sites(2)}
    clean = run(tmp_path / "clean", InProcessGrid(dict(honest)), num_rounds=1)
    deadline_s = 3.0 if how == "silent" else 60.0
    grid = InProcessGrid({**sites(2), 109: Liar(how)})
    folder = run(tmp_path / "lied", grid, num_rounds=1, **{"rounds.deadline_s": deadline_s})
    for name, value in params(clean).items():
        np.testing.assert_array_equal(params(folder)[name], value)
    event = events(folder, "round")[0]
    assert event["participants"] == ["site-0", "site-1"]
    [rejected] = event["rejected"]
    assert rejected["site"] == "site-9"
    assert any(part in rejected["reason"] for part in REASONS[how].split("|")), rejected


def test_a_late_reply_is_named_and_dropped_in_the_next_round(tmp_path: Path) -> None:
    grid = InProcessGrid(sites())
    slow = QuadraticSite("site-9", 9)
    grid.handlers[109] = slow

    def delay_training(message: FlowerMessage) -> FlowerMessage | None:
        grid.delays[109] = 3.5 if message.metadata.message_type == "train" else 0.0
        grid.delays[100] = 1.5 if message.metadata.message_type == "train" else 0.0
        return slow(message)

    grid.handlers[109] = delay_training
    folder = run(tmp_path, grid, num_rounds=2, **{"rounds.deadline_s": 3.0})
    first, second = events(folder, "round")
    assert first["rejected"] == [{"site": "site-9", "reason": "no reply before the round closed", "kind": "Silent"}]
    [late] = second["rejected"]
    assert late["site"] == "site-9"
    assert "earlier round" in late["reason"]
    assert late["kind"] == "Late"
    assert "site-9" not in first["participants"] + second["participants"]


def test_a_round_without_quorum_is_repeated_then_fails_with_everything_saved(tmp_path: Path) -> None:
    honest = QuadraticSite("site-0", 0)
    grid = InProcessGrid({100: honest, 109: Liar("refuses")})
    with pytest.raises(QuorumError, match=r"round 1 had no quorum 2 times.*resume=\"test\""):
        run(tmp_path, grid)
    folder = RunFolder.open(tmp_path, "test")
    assert [event["attempt"] for event in events(folder, "attempt")] == [1, 2]
    assert events(folder, "end")[0]["status"] == "failed"
    assert folder.report.is_file()
    state = load_latest(folder.checkpoints)
    assert state is not None
    assert state.round == 0


def test_a_failed_run_goes_on_when_its_sites_are_back(tmp_path: Path) -> None:
    with pytest.raises(QuorumError):
        run(tmp_path, InProcessGrid({100: QuadraticSite("site-0", 0, 10), 101: Liar("refuses")}))
    handlers = sites(2)
    folder = run(tmp_path, InProcessGrid(handlers), name="", resume="test")
    clean = run(tmp_path / "clean", InProcessGrid(sites(2)))
    for name, value in params(clean).items():
        np.testing.assert_array_equal(params(folder)[name], value)
    assert [event["round"] for event in events(folder, "round")] == [1, 2, 3]
    assert events(folder, "end")[-1]["status"] == "finished"


@pytest.mark.parametrize("field", list(Agreement.model_fields))
def test_a_site_that_holds_something_else_is_left_out_with_both_values(field: str, tmp_path: Path) -> None:
    other = AGREEMENT.model_copy(update={field: "something else"})
    grid = InProcessGrid({**sites(2), 109: QuadraticSite("site-9", 9, agreement=other)})
    folder = run(tmp_path, grid, num_rounds=1)
    [left_out] = events(folder, "left_out")
    assert left_out["site"] == "site-9"
    assert field in left_out["reason"]
    assert "something else" in left_out["reason"]
    assert getattr(AGREEMENT, field) in left_out["reason"]
    assert events(folder, "round")[0]["participants"] == ["site-0", "site-1"]


def test_a_node_that_was_away_when_it_was_greeted_is_greeted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server_app.roster.AGAIN_S", 0.3)
    members, greetings = sites(2), []

    def away_at_first(message: FlowerMessage) -> FlowerMessage | None:
        greetings.append(message)
        return flower_error(message, "Node Unavailable") if len(greetings) <= 2 else members[101](message)

    grid = InProcessGrid({100: members[100], 101: away_at_first})
    folder = run(tmp_path, grid, fixed_sites=False)
    assert events(folder, "round")[0]["participants"] == ["site-0", "site-1"]
    [told] = events(folder, "left_out")
    assert "Node Unavailable; it is greeted again" in told["reason"]


def test_a_second_node_under_a_taken_name_is_left_out(tmp_path: Path) -> None:
    grid = InProcessGrid({**sites(2), 109: QuadraticSite("site-1", 9)})
    folder = run(tmp_path, grid, num_rounds=1)
    [left_out] = events(folder, "left_out")
    assert "already takes part" in left_out["reason"]


def test_too_few_sites_end_the_run_with_every_sites_reason(tmp_path: Path) -> None:
    def without_data(message: FlowerMessage) -> FlowerMessage:
        from fedllm.records import to_records

        failure = Failure(site="site-9", error="DataError", reason="file missing; found /data/x")
        return FlowerMessage(to_records(failure), reply_to=message)

    with pytest.raises(QuorumError, match=r"expected at least 2.*found 1.*site-9: DataError: file missing"):
        run(tmp_path, InProcessGrid({**sites(1), 109: without_data}))


def test_over_selection_closes_a_round_when_enough_have_replied(tmp_path: Path) -> None:
    grid = InProcessGrid(sites(4))
    grid.delays[103] = 5.0
    del grid.handlers[103]
    grid.handlers[103] = QuadraticSite("site-3", 3)
    grid.delays[103] = 0.0
    changes = {"rounds.fraction": 0.5, "rounds.over_selection": 2.0, "num_rounds": 1}
    folder = run(tmp_path, grid, **changes)
    event = events(folder, "round")[0]
    assert len(event["asked"]) == 4
    assert len(event["participants"]) == 2
    assert {row["reason"] for row in event["rejected"]} == {"no reply before the round closed"}


def test_a_site_that_comes_up_later_joins_the_next_round(tmp_path: Path) -> None:
    grid = InProcessGrid(sites(2))
    late = QuadraticSite("site-2", 2)

    def first(message: FlowerMessage) -> FlowerMessage | None:
        if message.metadata.message_type == "train":
            grid.handlers[102] = late
        return site(message)

    site = grid.handlers[100]
    grid.handlers[100] = first
    folder = run(tmp_path, grid)
    assert [len(event["participants"]) for event in events(folder, "round")] == [2, 3, 3]


def test_a_run_can_be_resumed_for_more_rounds(tmp_path: Path) -> None:
    run(tmp_path, InProcessGrid(sites()), num_rounds=2)
    folder = run(tmp_path, InProcessGrid(sites()), name="", resume="test", num_rounds=4)
    expected = expected_params([QuadraticSite(f"site-{i}", i, 10 * (i + 1)) for i in range(3)], 4)
    assert_close(params(folder), expected)
    assert [event["round"] for event in events(folder, "round")] == [1, 2, 3, 4]


def test_a_resumed_run_is_evaluated_after_the_rounds_after_which_any_run_is(tmp_path: Path) -> None:
    grid, sent = InProcessGrid(sites(2)), 0
    honest = grid.handlers[101]

    def refuse_after_round_1(message: Any) -> Any:
        nonlocal sent
        sent += message.metadata.message_type == "train"
        return Liar("refuses")(message) if sent > 1 else honest(message)

    grid.handlers[101] = refuse_after_round_1
    with pytest.raises(QuorumError, match="round 2"):
        run(tmp_path, grid, **{"evaluation.every": 2})
    folder = run(tmp_path, InProcessGrid(sites(2)), name="", resume="test")
    assert [event["round"] for event in events(folder, "evaluation")] == [0, 2, 3]


def test_settings_of_a_resumed_run_that_have_no_effect_are_named(tmp_path: Path, caplog: Any) -> None:
    run(tmp_path, InProcessGrid(sites()), num_rounds=1)
    config = read_run_config({"home": str(tmp_path), "resume": "test", "train.learning_rate": 0.5})
    with caplog.at_level("WARNING", logger="server_app.app"):
        _, effective, _ = open_run(config)
    assert "train.learning_rate = 0.5 has no effect" in caplog.text
    assert effective.train.learning_rate == RunConfig().train.learning_rate
    assert dataclasses.is_dataclass(RunFolder)


TRANSPORTS = ["flower", "grpc"]
LOSSY = {"transport.uplink": "delta|int8:8", "transport.downlink": "delta|int8:8"}


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_both_transports_give_the_same_bits(kind: str, tmp_path: Path) -> None:
    one = params(run(tmp_path / "1", InProcessGrid(sites()), **LOSSY))
    two = params(run(tmp_path / "2", InProcessGrid(sites()), **LOSSY, **{"transport.kind": kind}))
    for name, value in one.items():
        np.testing.assert_array_equal(two[name], value)


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_a_state_travels_in_the_cheapest_way(kind: str, tmp_path: Path) -> None:
    handlers = sites(2)
    folder = run(tmp_path, InProcessGrid(handlers), num_rounds=2, **LOSSY, **{"transport.kind": kind})
    site = handlers[100]
    assert isinstance(site, QuadraticSite)
    #               evaluate 0  train 1  evaluate 1    train 2  evaluate 2    alone      answer
    assert site.deliveries == ["initial", "held", "difference", "held", "difference", "initial", "full"]
    assert [event["bytes_down"] for event in events(folder, "round")] == [0, 0]
    first = events(folder, "evaluation")
    assert first[0]["bytes_down"] == 0
    assert first[1]["bytes_down"] > 0


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_a_site_that_lost_its_state_gets_it_whole_within_the_round(kind: str, tmp_path: Path) -> None:
    handlers = sites(2)
    forgetful = handlers[100]
    assert isinstance(forgetful, QuadraticSite)

    def forget_once(message: FlowerMessage) -> FlowerMessage | None:
        is_second_round = (message.metadata.message_type, message.metadata.group_id) == ("train", "round-2")
        if is_second_round and "full" not in forgetful.deliveries:
            forgetful.held.clear()
        return forgetful(message)

    clean = params(run(tmp_path / "clean", InProcessGrid(sites(2)), **LOSSY))
    grid = InProcessGrid({**handlers, 100: forget_once})
    folder = run(tmp_path / "lost", grid, **LOSSY, **{"transport.kind": kind})
    assert "full" in forgetful.deliveries
    assert all(len(event["participants"]) == 2 for event in events(folder, "round"))
    for name, value in clean.items():
        np.testing.assert_array_equal(params(folder)[name], value)


def test_a_lost_reply_is_asked_for_again_and_counted_once(tmp_path: Path) -> None:
    lost = []

    def lose_first(message: FlowerMessage) -> FlowerMessage | None:
        reply = site(message)
        if message.metadata.message_type == "train" and not lost:
            lost.append(reply)
            return flower_error(message, "no response from the node")
        return reply

    handlers = sites(2)
    site = handlers[100]
    folder = run(tmp_path / "lost", InProcessGrid({**handlers, 100: lose_first}), num_rounds=1)
    clean = run(tmp_path / "clean", InProcessGrid(sites(2)), num_rounds=1)
    assert lost
    assert events(folder, "round")[0]["rejected"] == []
    for name, value in params(clean).items():
        np.testing.assert_array_equal(params(folder)[name], value)


def test_a_lossy_run_that_is_resumed_gives_the_same_bits(tmp_path: Path) -> None:
    """The difference that the next state is sent as refers to what the sites decoded, so that is in the checkpoint."""
    clean = run(tmp_path / "clean", InProcessGrid(sites(2)), num_rounds=4, **LOSSY)
    run(tmp_path / "cut", InProcessGrid(sites(2)), num_rounds=2, **LOSSY)
    folder = run(tmp_path / "cut", InProcessGrid(sites(2)), name="", resume="test", num_rounds=4)
    for name, value in params(clean).items():
        np.testing.assert_array_equal(params(folder)[name], value)


def test_what_a_lossy_downlink_drops_is_sent_later(tmp_path: Path) -> None:
    """A one-bit downlink still follows the server's state, because every difference holds what the last one dropped."""
    changes = {"transport.downlink": "delta|sign:8", "num_rounds": 30, "evaluation.every": 30}
    handlers = sites(2)
    run(tmp_path, InProcessGrid(handlers), **changes)
    members = [site for site in handlers.values() if isinstance(site, QuadraticSite)]
    expected = expected_params(members, 30)
    [held] = members[0].held.values()
    initial = initial_arrays(LAYOUT, 42)
    for name, value in expected.items():
        assert np.linalg.norm(held[name] - value) < 0.3 * np.linalg.norm(initial[name] - value)


def test_a_pipeline_that_leaves_a_tensor_out_ends_the_run_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lora_A"):
        run(tmp_path, InProcessGrid(sites()), **{"transport.uplink": "lora_B=int8:256"})


@pytest.mark.parametrize(
    ("uplink", "downlink"),
    [
        ("delta|mask:0.25|nf4:64", "delta|mask:0.5|bf16"),  # FLASC: the server's largest weights both ways
        ("delta|segment:2|int8:256", "delta|bf16"),  # EcoLoRA: sites take turns with the parts
    ],
)
def test_partial_uplinks_run_end_to_end_and_come_near_the_optimum(tmp_path: Path, uplink: str, downlink: str) -> None:
    changes = {"transport.uplink": uplink, "transport.downlink": downlink}
    folder = run(tmp_path, InProcessGrid(sites()), num_rounds=12, **changes)
    dense = run(tmp_path / "dense", InProcessGrid(sites()), num_rounds=12)
    assert progress(folder) > 0.4 * progress(dense)
    assert bytes_up(folder) < bytes_up(dense)


def progress(folder: RunFolder) -> float:
    losses = [event["loss"] for event in events(folder, "evaluation")]
    return losses[0] - losses[-1]


def bytes_up(folder: RunFolder) -> int:
    return sum(event["bytes_up"] for event in events(folder, "round"))
