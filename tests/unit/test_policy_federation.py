"""Federations with a site whose data owner sets bounds: the others go on, and everybody reads why."""

from __future__ import annotations

import math
from hashlib import sha256
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, RecordDict
from flwr.app import Message as FlowerMessage

from client_app import app as site_app
from client_app import gate
from fedllm.errors import QuorumError
from fedllm.messages import Failure
from fedllm.records import RECORD, from_records, to_records
from server_app import roster
from tests.fake_federation import InProcessGrid, QuadraticSite
from tests.owned_sites import grid_with_owned, owned, written
from tests.tiny_federation import run_tiny
from tests.tiny_federation import tiny_home as tiny_home
from tests.unit.test_loop import events, run, sites


def test_a_site_that_refuses_a_run_is_named_with_the_reason_and_the_others_finish(tiny_home: Path) -> None:
    grid = grid_with_owned(tiny_home, "[policy]\nmax_rank = 2\n")
    folder = run_tiny(tiny_home, grid, num_rounds=1)
    [left_out] = events(folder, "left_out")
    assert left_out["site"] == "clinic"
    assert (
        "PolicyError: the adapter's rank is too large; expected at most 2 (policy.max_rank); found 4"
        in left_out["reason"]
    )
    assert "clinic.toml of clinic" in left_out["reason"]
    assert events(folder, "round")[0]["participants"] == ["site-0", "site-1"]
    assert events(folder, "end")[0]["status"] == "finished"
    assert "left out clinic: PolicyError: the adapter's rank is too large" in folder.log.read_text()
    assert [record["event"] for record in written(tiny_home)] == ["received", "refused"]
    assert not list(folder.path.rglob("audit*")), "simulated sites have no data owner and write no audit log"


def test_a_site_that_has_trained_enough_drops_out_and_its_numbers_leave_rounded(tiny_home: Path) -> None:
    text = "[policy]\nmax_rounds_per_run = 1\n[sharing]\ndecimals = 1\ncount_multiple = 10\n"
    folder = run_tiny(tiny_home, grid_with_owned(tiny_home, text))
    first, second = events(folder, "round")
    assert first["participants"] == ["clinic", "site-0", "site-1"]
    assert second["participants"] == ["site-0", "site-1"]
    [rejected] = second["rejected"]
    assert rejected["site"] == "clinic"
    assert "PolicyError: the site has trained as many rounds for this run as it may" in rejected["reason"]
    assert "policy.max_rounds_per_run" in folder.log.read_text()
    numbers = first["sites"]["clinic"]
    assert numbers["loss"] == round(numbers["loss"], 1)
    assert numbers["weight"] == 20, "16 of 20 examples are trained on"
    assert numbers["num_tokens"] % 10 == 0
    assert first["sites"]["site-0"]["loss"] != round(first["sites"]["site-0"]["loss"], 1), (
        "others send theirs as they are"
    )
    score = events(folder, "evaluation")[0]["sites"]["clinic"]
    assert score["loss"] == round(score["loss"], 1)
    assert score["num_tokens"] % 10 == 0
    _check_log(tiny_home, numbers)


def _check_log(home: Path, numbers: dict[str, float]) -> None:
    """Hold what a site wrote down against what the server saw."""
    records = written(home)
    trained = [record for record in records if record.get("kind") == "train"]
    received, sending, sent, again, refused = trained
    assert [record["event"] for record in trained] == ["received", "sending", "sent", "received", "refused"]
    assert (received["round"], again["round"], received["asked"]["num_sites"]) == (1, 2, 3)
    assert received["settings"]["adapter.rank"] == 4
    assert received["app"] == "fedllm/fedllm"
    assert sent["numbers"]["loss"] == numbers["loss"]
    assert sent["numbers"]["num_examples"] == numbers["weight"]
    assert sent["payload"]["size"] == sending["bytes"]
    updates = [path.read_bytes() for path in home.rglob("round-00001.update")]
    assert sending["sha256"] in {sha256(update).hexdigest() for update in updates}
    assert sending["bytes"] > 0
    assert "max_rounds_per_run" in refused["reason"]
    assert records[0]["kind"] == "hello"
    assert {record["kind"] for record in records if record["event"] == "sent"} == {"hello", "train", "evaluate"}


def test_too_few_sites_after_a_refusal_end_the_run_with_the_reason(tiny_home: Path) -> None:
    grid = grid_with_owned(tiny_home, "[policy]\nbase_sources = ['hf:*']\n", others=1)
    with pytest.raises(QuorumError, match=r"expected at least 2.*clinic: PolicyError: the base model's source is not"):
        run_tiny(tiny_home, grid)


def test_a_site_that_shares_no_losses_still_takes_part(tiny_home: Path) -> None:
    folder = run_tiny(tiny_home, grid_with_owned(tiny_home, "[sharing]\nlosses = false\n"), num_rounds=1)
    [event] = events(folder, "round")
    assert event["participants"] == ["clinic", "site-0", "site-1"]
    shown = {site: float(numbers["loss"]) for site, numbers in event["sites"].items()}
    assert math.isnan(shown["clinic"])
    tokens = {site: event["sites"][site]["num_tokens"] for site in ("site-0", "site-1")}
    mean = sum(shown[site] * count for site, count in tokens.items()) / sum(tokens.values())
    assert event["train_loss"] == pytest.approx(mean)
    assert events(folder, "evaluation")[-1]["sites"].keys() == {"site-0", "site-1"}
    assert folder.report.is_file()


def test_a_refusal_loads_no_model_and_reads_no_data(tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = grid_with_owned(tiny_home, "[policy]\nruns = ['other']\n")
    (tiny_home / "own.jsonl").unlink()
    monkeypatch.setattr(site_app, "_perform", None)
    del grid.handlers[100], grid.handlers[101]
    with pytest.raises(QuorumError, match="the site takes no part in this run"):
        run_tiny(tiny_home, grid)


def test_what_cannot_be_written_down_is_not_done(tiny_home: Path) -> None:
    grid = grid_with_owned(tiny_home)
    (tiny_home / "state").write_text("a file where the folder should be")
    folder = run_tiny(tiny_home, grid, num_rounds=1)
    [left_out] = events(folder, "left_out")
    assert "AuditError: the audit log cannot be written" in left_out["reason"]


def test_a_message_that_is_none_of_ours_is_written_down(tmp_path: Path) -> None:
    owned(tmp_path)
    InProcessGrid({})
    message = FlowerMessage(RecordDict({RECORD: ConfigRecord({"message": '{"kind": "attack"}'})}), 7, "train")
    reply = site_app.train(message, Context(1, 7, {"site-config": str(tmp_path / "clinic.toml")}, RecordDict(), {}))
    answer, _ = from_records(reply.content, "test")
    assert isinstance(answer, Failure)
    [record] = written(tmp_path)
    assert record["event"] == "unreadable"
    assert "attack" in record["reason"]


def test_a_site_that_cannot_take_part_for_now_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "AGAIN_S", 0.0)
    closed, site = [True], QuadraticSite("site-9", 9)

    def late_opener(message: FlowerMessage) -> FlowerMessage | None:
        if closed:
            closed.clear()
            failure = Failure(site="site-9", error="PolicyError", reason="not at this time", retry_s=0.01)
            return FlowerMessage(to_records(failure), reply_to=message)
        return site(message)

    folder = run(tmp_path, InProcessGrid({**sites(2), 109: late_opener}), num_rounds=2)
    assert [event["site"] for event in events(folder, "left_out")] == ["site-9"]
    assert events(folder, "round")[-1]["participants"] == ["site-0", "site-1", "site-9"]


def test_a_site_whose_hours_end_during_a_run_drops_out_for_now(
    tiny_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter(range(100))
    start = gate.local_time().replace(hour=5, minute=0)
    monkeypatch.setattr(gate, "local_time", lambda: start.replace(minute=20 * min(2, next(times)), hour=5))
    grid = grid_with_owned(tiny_home, '[policy]\nhours = "05:00-05:40"\n')
    folder = run_tiny(tiny_home, grid, num_rounds=1)
    [event] = events(folder, "round")
    assert event["participants"] == ["site-0", "site-1"]
    assert "the site does not work at this time; expected 05:00-05:40" in event["rejected"][0]["reason"]
