"""What a site's own admin can watch, held against what the site's audit log says that it did."""

from __future__ import annotations

import json
import logging
import socket
import threading
from pathlib import Path

import pytest

from client_app.observability.families import KINDS, LOSSES, OUTCOMES, SERVICE, WORK
from client_app.observability.show import shown, site_board
from client_app.observability.tally import FILE, Tally
from client_app.service.folder import ServiceFolder
from client_app.service.status import Status, write_status
from client_app.site import load_site_config
from fedllm.cli.main import main
from fedllm.errors import ConfigError, DataError
from fedllm.messages import Hello
from fedllm.observability.endpoint import as_text
from tests.free_ports import free_port
from tests.owned_sites import HEAD, grid_with_owned, owned, written
from tests.scrape import Figures, read, scrape, value
from tests.tiny_federation import run_tiny
from tests.tiny_federation import tiny_home as tiny_home


def figures_of(home: Path) -> Figures:
    return read(as_text(site_board(load_site_config(home / "clinic.toml")), {"site": "clinic"}))


def hello() -> Hello:
    return Hello(run="r", run_folder="", config={})


def test_a_site_counts_what_its_audit_log_says(tiny_home: Path) -> None:
    run_tiny(tiny_home, grid_with_owned(tiny_home, "[policy]\nmax_rounds_per_run = 2\n"), num_rounds=3)
    figures, records = figures_of(tiny_home), written(tiny_home)
    answers = {"sent": "done", "refused": "refused", "failed": "failed"}
    counted = {(event, kind): 0 for event in answers for kind in KINDS}
    for record in records:
        if record["event"] in answers:
            counted[record["event"], record["kind"]] += 1
    for (event, kind), count in counted.items():
        told = [
            v
            for (n, own), v in figures.items()
            if n == "fedllm_site_tasks_total" and own >= {("kind", kind), ("outcome", answers[event])}
        ]
        assert sum(told) == count, (event, kind)
    trained = [record for record in records if record["event"] == "sent" and record["kind"] == "train"]
    assert len(trained) == 2, "the third was refused"
    assert value(figures, "fedllm_site_round", site="clinic") == 2
    assert value(figures, "fedllm_site_trained_steps_total") == sum(r["numbers"]["num_steps"] for r in trained)
    assert value(figures, "fedllm_site_trained_tokens_total") == sum(r["numbers"]["num_tokens"] for r in trained)
    assert value(figures, "fedllm_site_train_loss") == trained[-1]["numbers"]["loss"]
    assert value(figures, "fedllm_site_sent_payload_bytes_total") == sum(r["payload"]["size"] for r in trained)
    scores = [r["numbers"]["score"]["loss"] for r in records if r["event"] == "sent" and r["kind"] == "evaluate"]
    assert value(figures, "fedllm_site_heldout_loss") == scores[-1]
    seconds = value(figures, "fedllm_site_training_seconds_total")
    assert 0 < seconds <= value(figures, "fedllm_site_task_seconds_sum", kind="train")
    assert value(figures, "fedllm_site_tokens_per_second") > 0
    assert value(figures, "fedllm_site_memory_peak_bytes") > 1e7
    assert (tiny_home / "state" / FILE).stat().st_mode & 0o777 == 0o600


def test_losses_that_do_not_leave_are_not_shown_either(tiny_home: Path) -> None:
    run_tiny(tiny_home, grid_with_owned(tiny_home), num_rounds=1)
    assert "loss" in as_text(site_board(load_site_config(tiny_home / "clinic.toml")))
    owned(tiny_home, "[sharing]\nlosses = false\n")
    owner = load_site_config(tiny_home / "clinic.toml")
    assert "loss" not in as_text(site_board(owner)), "those from before are gone too"
    Tally(owner, hello()).failed(DataError("x"))
    assert "loss" not in (tiny_home / "state" / FILE).read_text()


def test_a_site_that_shares_no_losses_counts_its_training_without_them(tiny_home: Path) -> None:
    run_tiny(tiny_home, grid_with_owned(tiny_home, "[sharing]\nlosses = false\n"), num_rounds=1)
    assert value(figures_of(tiny_home), "fedllm_site_round") == 1
    assert "loss" not in as_text(site_board(load_site_config(tiny_home / "clinic.toml")))
    assert "loss" not in (tiny_home / "state" / FILE).read_text()


def test_messages_counted_at_the_same_time_are_all_counted(tmp_path: Path) -> None:
    owner = owned(tmp_path)
    threads = [threading.Thread(target=Tally(owner, hello()).failed, args=(DataError("x"),)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(figures_of(tmp_path), "fedllm_site_tasks_total", kind="hello", outcome="failed") == 16
    assert value(figures_of(tmp_path), "fedllm_site_task_seconds_count", kind="hello") == 16


def test_a_damaged_file_begins_anew_and_keeps_nobody_from_working(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    owner = owned(tmp_path)
    Tally(owner, hello()).failed(DataError("x"))
    (tmp_path / "state" / FILE).write_text('[{"family": "fedllm_si')
    Tally(owner, hello()).failed(DataError("x"))
    assert value(figures_of(tmp_path), "fedllm_site_tasks_total", outcome="failed") == 1
    assert "begin anew" in caplog.text


def test_figures_that_cannot_be_written_are_given_up_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    owner = owned(tmp_path)
    (tmp_path / "state").write_text("a file where the folder should be")
    Tally(owner, hello()).failed(DataError("x"))
    assert "cannot be written" in caplog.text


def test_the_service_answers_prometheus_while_it_runs_and_only_then(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "site.toml").write_text(HEAD + f'[observability]\nmetrics = "127.0.0.1:{port}"\n')
    owner, folder = load_site_config(tmp_path / "site.toml"), ServiceFolder(tmp_path)
    folder.make()
    Tally(owner, hello()).failed(DataError("x"))
    status = Status(phase="connected", started="2026-11-21T18:00:00+00:00", num_restarts=3)
    write_status(folder.status, status)
    with shown(folder, owner, logging.getLogger("test")):
        before = read(scrape(port))
        write_status(folder.status, status.model_copy(update={"phase": "waiting"}))
        Tally(owner, hello()).failed(DataError("x"))
        after = read(scrape(port))
    assert value(before, "fedllm_site_connected", site="clinic") == 1
    assert value(after, "fedllm_site_connected") == 0
    assert value(after, "fedllm_site_restarts_total") == 3
    assert value(after, "fedllm_site_started_timestamp_seconds") == 1795284000
    assert value(after, "fedllm_site_tasks_total", kind="hello") == value(before, "fedllm_site_tasks_total") + 1
    with pytest.raises(OSError, match="refused"):
        scrape(port)


def test_the_service_shows_no_loss_while_the_data_owner_s_file_is_wrong(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "site.toml").write_text(HEAD + f'[observability]\nmetrics = "127.0.0.1:{port}"\n')
    owner, folder = load_site_config(tmp_path / "site.toml"), ServiceFolder(tmp_path)
    folder.make()
    state = tmp_path / "state"
    state.mkdir()
    (state / FILE).write_text(json.dumps([{"family": "fedllm_site_train_loss", "value": 2.5}]))
    with shown(folder, owner, logging.getLogger("test")):
        assert value(read(scrape(port)), "fedllm_site_train_loss") == 2.5
        (tmp_path / "site.toml").write_text(HEAD + "[sharing]\nlosses = fal")
        assert "train_loss" not in scrape(port)


def test_nothing_listens_unless_the_data_owner_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client_app.observability.show.Endpoint", None)
    with shown(ServiceFolder(tmp_path), owned(tmp_path), logging.getLogger("test")):
        pass


def test_a_service_goes_on_where_its_port_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        owner = owned(tmp_path, f'[observability]\nmetrics = "127.0.0.1:{other.getsockname()[1]}"\n')
        with shown(ServiceFolder(tmp_path), owner, logging.getLogger("test")):
            assert "no metrics" in caplog.text


def test_the_command_prints_what_prometheus_would_be_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    owner = owned(tmp_path)
    Tally(owner, hello()).failed(DataError("x"))
    assert main(["site", "metrics", str(tmp_path / "clinic.toml")]) == 0
    figures = read(capsys.readouterr().out)
    assert value(figures, "fedllm_site_tasks_total", site="clinic", kind="hello", outcome="failed") == 1
    assert value(figures, "fedllm_site_connected") == 0


def test_a_wrong_address_is_refused_when_the_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:9300"):
        owned(tmp_path, '[observability]\nmetrics = "here"\n')


def test_a_federation_s_sites_are_told_apart_from_its_server() -> None:
    names = [family.name for family in (*WORK, *LOSSES, *SERVICE)]
    assert all(name.startswith("fedllm_site_") for name in names)
    assert len(set(names)) == len(names)
    assert set(OUTCOMES) == {"done", "refused", "failed"}
    assert {"hello", "train", "evaluate", "local-only", "personalise", "first-state"} <= KINDS
    assert not {"trained", "failure", "introduction"} & KINDS, "answers are no messages of the server"
