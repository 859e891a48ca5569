"""What Prometheus is told about a run, held against what the run wrote down."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message as FlowerMessage

from fedllm.config import RunConfig, read_run_config
from fedllm.errors import ConfigError, QuorumError
from fedllm.messages import AnyMessage, Failure, TrainInstruction
from fedllm.observability.board import OTHERS
from fedllm.runs import RunFolder, read_metrics
from fedllm.wire.transport import Envelope
from server_app.app import open_run, run_federation
from server_app.events import parse_event
from server_app.observability.families import FAMILIES, MAX_SITES, REASONS
from server_app.observability.figures import RunFigures
from tests.fake_federation import Handler, InProcessGrid, QuadraticSite, flower_error
from tests.free_ports import free_port
from tests.sample_runs import sample_events
from tests.scrape import Figures, Scraper, read, scrape, value
from tests.unit.test_loop import SETTINGS


class Naughty(QuadraticSite):
    """Fails in one round, with an error's name of its own choosing."""

    def __init__(self, name: str, seed: int, round_: int, error: str) -> None:
        super().__init__(name, seed)
        self.bad_round, self.error = round_, error

    def answer(self, instruction: AnyMessage, envelope: Envelope) -> tuple[AnyMessage, Envelope | None]:
        if isinstance(instruction, TrainInstruction) and instruction.round == self.bad_round:
            return Failure(site=self.name, error=self.error, reason="no"), None
        return super().answer(instruction, envelope)


class Dying(QuadraticSite):
    """Its process dies whenever it should train."""

    def __call__(self, message: FlowerMessage) -> FlowerMessage | None:
        reply = super().__call__(message)
        return flower_error(message) if isinstance(self.seen[-1], TrainInstruction) else reply


def run(home: Path, handlers: Mapping[int, Handler], port: int, **changes: Any) -> tuple[RunFolder, Figures]:
    """Run a federation that is watched over HTTP, and return its folder and the last answer."""
    settings = {**SETTINGS, "rounds.deadline_s": 5.0, "observability.metrics": f"127.0.0.1:{port}", **changes}
    folder, config, state = open_run(read_run_config({**settings, "home": str(home)}))
    with Scraper(port) as scraper:
        run_federation(InProcessGrid(dict(handlers)), folder, config, state, run_id=1, fixed_sites=True)
    return folder, read(scraper.text)


def assert_tells_what_was_recorded(figures: Figures, folder: RunFolder) -> None:
    """Count ``metrics.jsonl`` by hand and compare, figure by figure."""
    events = read_metrics(folder.metrics)
    attempts = [event for event in events if event["event"] in ("round", "attempt")]
    rounds = [event for event in attempts if event["event"] == "round"]
    scores = [event for event in events if event["event"] == "evaluation"]
    rejected = [part for event in attempts for part in event["rejected"]]

    def told(name: str, **labels: str) -> float:
        return value(figures, name, run=folder.name, **labels)

    assert told("fedllm_rounds_total", outcome="done") == len(rounds)
    assert told("fedllm_round") == rounds[-1]["round"]
    assert told("fedllm_participants") == len(attempts[-1]["participants"])
    assert told("fedllm_updates_used_total") == sum(len(event["participants"]) for event in rounds)
    assert told("fedllm_payload_bytes_total", direction="up") == sum(event["bytes_up"] for event in attempts)
    down = sum(event["bytes_down"] for event in [*attempts, *scores])
    assert told("fedllm_payload_bytes_total", direction="down") == down
    assert told("fedllm_train_loss") == rounds[-1]["train_loss"]
    assert told("fedllm_update_norm") == rounds[-1]["update_norm"]
    assert told("fedllm_heldout_loss", text="sites") == scores[-1]["loss"]
    assert told("fedllm_heldout_loss", text="worst_site") == scores[-1]["worst_loss"]
    assert told("fedllm_base_heldout_loss") == scores[0]["loss"]
    assert told("fedllm_best_heldout_loss") == min(event["loss"] for event in scores[1:])
    tokens = sum(part["num_tokens"] for event in rounds for part in event["sites"].values())
    assert told("fedllm_trained_tokens_total") == tokens
    assert told("fedllm_round_seconds_count") == len(attempts)
    assert told("fedllm_round_seconds_sum") == math.fsum(event["seconds"] for event in attempts)
    for phase in rounds[0]["phases"]:
        seconds = [event["phases"][phase] for event in attempts if phase in event["phases"]]
        assert told("fedllm_round_phase_seconds_sum", phase=phase) == pytest.approx(math.fsum(seconds), rel=1e-12)
        assert told("fedllm_round_phase_seconds_count", phase=phase) == len(seconds)
    total = sum(count for (name, _), count in figures.items() if name == "fedllm_updates_rejected_total")
    assert total == len(rejected)
    for site in {part["site"] for part in rejected}:
        told_ = told("fedllm_site_updates_total", site=site, outcome="rejected")
        assert told_ == sum(part["site"] == site for part in rejected)
    assert told("fedllm_last_event_timestamp_seconds") == events[-1]["time"]
    assert told("fedllm_run_ended", status=events[-1]["status"]) == 1
    assert told("fedllm_rounds_planned") >= told("fedllm_round")


def test_prometheus_is_told_what_the_run_writes_down(tmp_path: Path) -> None:
    members = {
        1: QuadraticSite("site-0", 0),
        2: QuadraticSite("site-1", 1, 20),
        3: Naughty("site-2", 2, round_=2, error="PolicyError"),
        4: Naughty("site-3", 3, round_=1, error='Mine"} 1\nfedllm_round 99'),
    }
    folder, figures = run(tmp_path, members, free_port())
    assert_tells_what_was_recorded(figures, folder)
    assert value(figures, "fedllm_updates_rejected_total", reason="PolicyError") == 1
    assert value(figures, "fedllm_updates_rejected_total", reason="Other") == 1, "a site's own words are no label"
    assert value(figures, "fedllm_run_info", strategy="fedavg", adapter="lora") == 1
    assert value(figures, "process_resident_memory_bytes") > 1e6


def test_a_resumed_run_goes_on_counting_where_it_stood(tmp_path: Path) -> None:
    members = {1: QuadraticSite("site-0", 0), 2: QuadraticSite("site-1", 1)}
    run(tmp_path, members, free_port(), num_rounds=2)
    folder, figures = run(tmp_path, members, free_port(), resume="test", num_rounds=3)
    assert value(figures, "fedllm_rounds_total", outcome="done") == 3
    assert_tells_what_was_recorded(figures, folder)


def test_a_run_without_quorum_ends_with_figures_that_say_so(tmp_path: Path) -> None:
    members = {1: QuadraticSite("site-0", 0), 2: Dying("site-1", 1)}
    port = free_port()
    settings = {**SETTINGS, "observability.metrics": f"127.0.0.1:{port}", "home": str(tmp_path)}
    folder, config, state = open_run(read_run_config(settings))
    with Scraper(port) as scraper, pytest.raises(QuorumError):
        run_federation(InProcessGrid(dict(members)), folder, config, state, run_id=1, fixed_sites=True)
    figures = read(scraper.text)
    assert value(figures, "fedllm_rounds_total", outcome="in_vain") == 2
    assert value(figures, "fedllm_updates_rejected_total", reason="FlowerError") == 2
    assert value(figures, "fedllm_run_ended", status="failed") == 1
    assert not any(name == "fedllm_round" for name, _ in figures), "no round has moved the adapter"


def test_the_spool_is_measured_while_payloads_lie_in_it(tmp_path: Path) -> None:
    port = free_port()
    seen: list[Figures] = []

    class Watched(QuadraticSite):
        def push(self, *arguments: Any, **changes: Any) -> Envelope:
            envelope = super().push(*arguments, **changes)
            seen.append(read(scrape(port)))
            return envelope

    members = {1: Watched("site-0", 0), 2: Watched("site-1", 1)}
    folder, figures = run(tmp_path, members, port, **{"transport.kind": "grpc", "num_rounds": 1})
    assert value(seen[-1], "fedllm_spool_bytes") > 100
    assert value(seen[-1], "fedllm_spool_files") > value(seen[0], "fedllm_spool_files") >= 1
    assert value(figures, "fedllm_spool_bytes") == 0, "emptied at the end"
    assert_tells_what_was_recorded(figures, folder)


def test_without_an_address_nothing_listens_and_nothing_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_app.observability.serve.Endpoint", None)
    members = {1: QuadraticSite("site-0", 0), 2: QuadraticSite("site-1", 1)}
    folder, config, state = open_run(read_run_config({**SETTINGS, "home": str(tmp_path), "num_rounds": 1}))
    run_federation(InProcessGrid(dict(members)), folder, config, state, run_id=1, fixed_sites=True)
    assert read_metrics(folder.metrics)[-1]["status"] == "finished"


def test_the_environment_says_where_when_the_run_config_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("FEDLLM_METRICS", f"127.0.0.1:{port}")
    members = {1: QuadraticSite("site-0", 0), 2: QuadraticSite("site-1", 1)}
    folder, figures = run(tmp_path, members, port, **{"observability.metrics": "", "num_rounds": 1})
    assert_tells_what_was_recorded(figures, folder)


def test_a_run_does_not_fail_or_wait_where_its_port_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {1: QuadraticSite("site-0", 0), 2: QuadraticSite("site-1", 1)}
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        settings = {**SETTINGS, "home": str(tmp_path), "num_rounds": 1, "observability.metrics": address}
        folder, config, state = open_run(read_run_config(settings))
        run_federation(InProcessGrid(dict(members)), folder, config, state, run_id=1, fixed_sites=True)
    end = read_metrics(folder.metrics)[-1]
    assert end["status"] == "finished"
    assert time.time() - end["time"] < config.observability.linger_s
    assert any("no metrics for Prometheus" in record.getMessage() for record in caplog.records)


def test_after_the_end_a_run_waits_for_one_request_at_most_so_long(tmp_path: Path) -> None:
    members = {1: QuadraticSite("site-0", 0), 2: QuadraticSite("site-1", 1)}
    settings = {**SETTINGS, "home": str(tmp_path), "num_rounds": 1, "observability.metrics": "127.0.0.1:0"}
    folder, config, state = open_run(read_run_config({**settings, "observability.linger_s": 0.5}))
    run_federation(InProcessGrid(dict(members)), folder, config, state, run_id=1, fixed_sites=True)
    waited = time.time() - read_metrics(folder.metrics)[-1]["time"]
    assert 0.5 <= waited < 5.0


@pytest.mark.parametrize("address", ["9300", "localhost", "127.0.0.1:", "http://127.0.0.1:9300", "127.0.0.1:70000"])
def test_an_address_that_cannot_be_read_ends_a_run_before_it_begins(address: str) -> None:
    with pytest.raises(ConfigError, match="such as"):
        read_run_config({"observability.metrics": address})


def test_metrics_stay_off_the_ports_that_the_gateway_lets_sites_reach() -> None:
    with pytest.raises(ConfigError, match="uses ports of"):
        read_run_config({"observability.metrics": "0.0.0.0:9299-9305"})
    assert read_run_config({"observability.metrics": "0.0.0.0:9300-9305"}).observability.metrics


def test_many_sites_make_few_figures() -> None:
    figures = RunFigures(RunConfig(), Path("nowhere"))
    sites = {f"site-{number}": 3.0 for number in range(10 * MAX_SITES)}
    figures.begin([parse_event(event) for event in sample_events(3, sites)])
    names = {figure.labels[0] for figure in figures.board().figures("fedllm_site_updates_total")}
    assert len(names) == MAX_SITES + 1
    assert OTHERS in names
    used = sum(f.value for f in figures.board().figures("fedllm_site_updates_total") if f.labels[1] == "used")
    assert used == sum(f.value for f in figures.board().figures("fedllm_updates_used_total"))
    assert sum(1 for _ in figures.board().figures()) < 300


def test_reasons_are_few_and_known() -> None:
    assert {"PolicyError", "UpdateError", "TransportError", "FlowerError", "Late", "Silent", "Other"} <= REASONS
    assert len(REASONS) < 40
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
