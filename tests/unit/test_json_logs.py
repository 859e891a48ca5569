"""Logs for machines: one object a line, on the server and at sites, and nothing in them that is nobody's business."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message as FlowerMessage
from hypothesis import given
from hypothesis import strategies as st

from client_app.service.flower import environment
from client_app.service.folder import ServiceFolder
from client_app.service.log import ServiceLines, service_log
from fedllm.logs import FORMAT_VARIABLE, PACKAGES, JsonLines, TextLines, about, set_up_logging, wants_json
from fedllm.records import from_records
from fedllm.runs import read_metrics
from tests.fake_federation import Handler, InProcessGrid, QuadraticSite
from tests.owned_sites import grid_with_owned
from tests.tiny_federation import run_tiny
from tests.tiny_federation import tiny_home as tiny_home
from tests.unit.test_loop import run

KEYS = {"time", "level", "logger", "run", "round", "node", "event", "message"}


@contextmanager
def logged(monkeypatch: pytest.MonkeyPatch, log_format: str) -> Iterator[io.StringIO]:
    """Set logging up as a process does that begins, into a buffer in the place of standard error."""
    buffer = io.StringIO()
    kept = {
        name: (logging.getLogger(name).handlers, logging.getLogger(name).propagate, logging.getLogger(name).level)
        for name in PACKAGES
    }
    monkeypatch.setenv(FORMAT_VARIABLE, log_format)
    for name in PACKAGES:
        logging.getLogger(name).handlers = []
    try:
        with redirect_stderr(buffer):  # until the handler has it; what libraries print themselves is not ours
            set_up_logging()
        yield buffer
    finally:
        for name, (handlers, propagate, level) in kept.items():
            logger = logging.getLogger(name)
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def objects(text: str) -> list[dict[str, Any]]:
    """Read every line as an object with the keys that are promised."""
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert set(line) - {"error"} == KEYS, line
        assert datetime.fromisoformat(line["time"]).tzinfo is not None
        assert line["level"] in ("debug", "info", "warning", "error", "critical")
    return lines


def test_a_run_s_log_is_one_object_an_event_that_says_what_it_is_about(
    tiny_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with logged(monkeypatch, "json") as buffer:
        folder = run_tiny(tiny_home, grid_with_owned(tiny_home, "[policy]\nmax_rounds_per_run = 1\n"))
    lines = objects(buffer.getvalue())
    story = [line for line in lines if line["event"] != "log"]
    told = [event for event in read_metrics(folder.metrics) if event["event"] != "answer"]
    assert [line["event"] for line in story] == [event["event"] for event in told]
    assert [line["round"] for line in story if line["event"] == "round"] == [1, 2]
    assert {line["run"] for line in lines} <= {folder.name, None}
    assert {line["node"] for line in story} == {"server"}
    site = [line for line in lines if line["node"] == "clinic"]
    assert any("cannot do what was asked" in line["message"] and line["round"] == 2 for line in site)
    rejected = [line for line in lines if line["message"].startswith("rejected the update of clinic")]
    assert [(line["level"], line["node"], line["round"]) for line in rejected] == [("warning", "server", 2)]
    assert any("\n" in line["message"] for line in story), "an event of several lines stays one object"


def test_text_stays_as_it_was_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members: dict[int, Handler] = {1: QuadraticSite("site-0", 0), 2: QuadraticSite("site-1", 1)}
    with logged(monkeypatch, "text") as buffer:
        folder = run(tmp_path, InProcessGrid(members), num_rounds=1)
    lines = buffer.getvalue().splitlines()
    assert all(re.match(r"(INFO|WARNING) +", line) for line in lines)
    assert sum("round 1/1" in line for line in lines) >= 3
    stamped = folder.log.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ ", line) for line in stamped)


def test_tickets_and_what_they_are_made_with_are_in_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets: set[str] = set()
    keys: set[bytes] = set()
    generate = __import__("fedllm.wire.ticket", fromlist=["TicketKey"]).TicketKey.generate

    def remembered() -> Any:
        key = generate()
        keys.update(value for value in vars(key).values() if isinstance(value, bytes))
        return key

    monkeypatch.setattr("server_app.transports.TicketKey.generate", remembered)

    class Reader(QuadraticSite):
        def __call__(self, message: FlowerMessage) -> FlowerMessage | None:
            _, envelope = from_records(message.content, "test")
            secrets.update(str(value) for name, value in envelope.fields.items() if "ticket" in name)
            return super().__call__(message)

    monkeypatch.setenv("FEDLLM_LOG_LEVEL", "DEBUG")
    members: dict[int, Handler] = {1: Reader("site-0", 0), 2: Reader("site-1", 1)}
    with logged(monkeypatch, "json") as buffer:
        folder = run(tmp_path, InProcessGrid(members), num_rounds=2, **{"transport.kind": "grpc"})
    assert len([text for text in secrets if len(text) > 20]) >= 4, "tickets went to the sites"
    assert keys
    said = buffer.getvalue() + folder.log.read_text() + folder.metrics.read_text()
    assert len(objects(buffer.getvalue())) > 5
    for secret in {text for text in secrets if len(text) > 20} | {key.hex() for key in keys}:
        assert secret not in said


@given(message=st.text(), run_=st.text(max_size=20))
def test_any_message_is_one_line_that_comes_back(message: str, run_: str) -> None:
    record = logging.LogRecord("server_app.x", logging.WARNING, "file", 1, "%s", (message,), None)
    record.password = "hush"  # what a call has beside its message is not written
    with about(run=run_, node="server"):
        line = JsonLines().format(record)
    assert line.isascii()
    assert len(line.splitlines()) == 1, "whatever a reader takes for the end of a line"
    [read] = [json.loads(line)]
    assert (read["message"], read["run"], read["node"], read["event"]) == (message, run_, "server", "log")
    assert "hush" not in line


def test_an_exception_s_trace_is_inside_the_object() -> None:
    try:
        raise ValueError("broken\nin two")
    except ValueError:
        import sys

        record = logging.LogRecord("client_app.x", logging.ERROR, "file", 1, "failed", (), sys.exc_info())
    read = json.loads(JsonLines().format(record))
    assert "ValueError: broken" in read["error"]
    text = TextLines("%(levelname)s %(message)s").format(record)
    assert text.startswith("ERROR failed\nTraceback")


def test_what_was_said_before_holds_again_afterwards_also_after_an_error() -> None:
    def now() -> Any:
        return json.loads(JsonLines().format(logging.LogRecord("x", 20, "f", 1, "m", (), None)))

    with about(run="r"):
        with about(round=3, node="a"):
            assert (now()["run"], now()["round"], now()["node"]) == ("r", 3, "a")
        with pytest.raises(ValueError, match="invalid"), about(round=4):
            int("no number")
        assert (now()["run"], now()["round"], now()["node"]) == ("r", None, None)
    assert now()["run"] is None


def test_a_service_s_log_is_json_whoever_speaks(tmp_path: Path) -> None:
    folder = ServiceFolder(tmp_path)
    folder.make()
    log = service_log(folder, "clinic", echo=False, as_json=True)
    own = JsonLines().format(logging.LogRecord("client_app.tasks", 20, "f", 1, "trained", (), None))
    log.info("[service] begins for site %s", "clinic")
    log.info("%s", "INFO :      SuperNode ID: 15")
    log.info("%s", own)
    log.info("%s", "{not json")
    for handler in log.handlers:
        handler.close()
    service, flower, client, odd = objects(folder.log.read_text())
    assert (service["event"], service["message"], service["node"]) == ("service", "begins for site clinic", "clinic")
    assert (flower["event"], flower["message"]) == ("output", "INFO :      SuperNode ID: 15")
    assert client == json.loads(own), "an object of the ClientApp's stays as it is"
    assert odd["message"] == "{not json"


@given(text=st.text())
def test_no_output_of_a_program_breaks_a_service_s_log(text: str) -> None:
    record = logging.LogRecord("x", 20, "f", 1, "%s", (text.replace("\n", " "),), None)
    line = ServiceLines("clinic").format(record)
    assert isinstance(json.loads(line), dict)
    assert "\n" not in line


def test_a_setting_or_the_environment_asks_for_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(FORMAT_VARIABLE, raising=False)
    assert not wants_json()
    assert wants_json("json")
    monkeypatch.setenv(FORMAT_VARIABLE, "JSON")
    assert wants_json("text")
    assert environment(ServiceFolder(tmp_path), {FORMAT_VARIABLE: "json"})[FORMAT_VARIABLE] == "json"
