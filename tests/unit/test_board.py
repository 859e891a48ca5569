"""Boards of figures, and the endpoint that shows them."""

from __future__ import annotations

import socket
import threading
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from fedllm.errors import ConfigError
from fedllm.observability import endpoint as endpoint_module
from fedllm.observability.address import Address
from fedllm.observability.board import Board, Bounded, Family, Figure
from fedllm.observability.endpoint import Endpoint, as_text
from tests.scrape import read, scrape, value

FAMILIES = (
    Family("things_total", "counter", "Things.", ("kind",)),
    Family("level", "gauge", "A level."),
    Family("work_seconds", "summary", "Work.", ("kind", "place")),
)
LABEL = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
NUMBER = st.floats(0, 1e12)


@given(things=st.lists(st.tuples(LABEL, NUMBER)), work=st.lists(st.tuples(LABEL, LABEL, NUMBER)), run=LABEL)
def test_prometheus_reads_back_what_was_counted_whatever_the_names(
    things: list[tuple[str, float]], work: list[tuple[str, str, float]], run: str
) -> None:
    board = Board(FAMILIES)
    for kind, amount in things:
        board.add("things_total", amount, kind=kind)
    for kind, place, seconds in work:
        board.observe("work_seconds", seconds, kind=kind, place=place)
    figures = read(as_text(board, {"run": run}))
    for kind in {kind for kind, _ in things}:
        expected = sum(amount for other, amount in things if other == kind)
        assert value(figures, "things_total", kind=kind, run=run) == pytest.approx(expected)
    for kind, place in {(kind, place) for kind, place, _ in work}:
        expected = [seconds for *other, seconds in work if tuple(other) == (kind, place)]
        assert value(figures, "work_seconds_sum", kind=kind, place=place) == pytest.approx(sum(expected))
        assert value(figures, "work_seconds_count", kind=kind, place=place) == len(expected)
    names = {series for family in FAMILIES for series in family.series}
    assert {name for name, _ in figures} <= names


@given(amounts=st.lists(NUMBER), later=st.lists(NUMBER))
def test_a_board_made_of_a_board_s_figures_goes_on_where_that_one_stood(
    amounts: list[float], later: list[float]
) -> None:
    one = Board(FAMILIES)
    for number, amount in enumerate([*amounts, *later]):
        if number == len(amounts):
            stored = [figure.model_dump_json() for figure in one.figures()]
            one = Board(FAMILIES, [Figure.model_validate_json(text) for text in stored])
        one.add("things_total", amount, kind="a")
        one.observe("work_seconds", amount, kind="a", place="b")
        one.set("level", amount)
    whole = Board(FAMILIES)
    for amount in [*amounts, *later]:
        whole.add("things_total", amount, kind="a")
        whole.observe("work_seconds", amount, kind="a", place="b")
        whole.set("level", amount)
    assert list(one.figures()) == list(whole.figures())


def test_figures_that_a_release_does_not_know_are_left_out() -> None:
    stored = [Figure(family="gone", value=1), Figure(family="things_total", labels=("a", "more"), value=1)]
    assert list(Board(FAMILIES, stored).figures()) == []


def test_a_figure_that_is_no_number_is_shown_as_one() -> None:
    board = Board(FAMILIES)
    board.set("level", float("nan"))
    (figure,) = board.figures()
    assert Figure.model_validate_json(figure.model_dump_json()).value != figure.value, "not a number"
    assert "level NaN" in as_text(board)


def test_each_family_has_its_kind_and_help() -> None:
    board = Board(FAMILIES)
    board.add("things_total", kind="a")
    board.set("level", 1)
    board.observe("work_seconds", 1, kind="a", place="b")
    found = {family.name: family for family in text_string_to_metric_families(as_text(board))}
    assert {name: family.type for name, family in found.items()} == {
        "things": "counter",
        "level": "gauge",
        "work_seconds": "summary",
    }
    assert found["things"].documentation == "Things."


@given(names=st.lists(st.text(max_size=3)))
def test_a_bound_on_names_holds_and_a_name_keeps_its_place(names: list[str]) -> None:
    bounded = Bounded(3)
    shown = [bounded(name) for name in names]
    assert len(set(shown)) <= 4
    assert [bounded(name) for name in names] == shown or len(set(names)) <= 3


@pytest.mark.parametrize(
    ("text", "host", "ports"),
    [
        ("127.0.0.1:9300", "127.0.0.1", range(9300, 9301)),
        ("0.0.0.0:9300-9309", "0.0.0.0", range(9300, 9310)),
        ("[::1]:9300", "::1", range(9300, 9301)),
        ("metrics.example:0", "metrics.example", range(1)),
    ],
)
def test_addresses_are_read(text: str, host: str, ports: range) -> None:
    assert Address.parse(text) == Address(host, ports)


@given(text=st.text(max_size=20))
def test_any_other_text_is_refused_in_words(text: str) -> None:
    try:
        address = Address.parse(text)
    except ConfigError:
        return
    assert address.host
    assert 0 <= address.ports.start <= address.ports[-1] <= 65535


def test_the_next_port_of_a_range_is_taken_where_one_is_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        first = other.getsockname()[1]
        address = Address("127.0.0.1", range(first, min(first + 20, 65536)))
        with closing(Endpoint(address, lambda: Board(FAMILIES))) as endpoint:
            port = int(endpoint.url.split(":")[2].split("/")[0])
            assert first < port < first + 20
            assert "process_cpu_seconds_total" in scrape(port)


def test_an_endpoint_finishes_its_answers_and_nobody_silent_holds_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module._Handler, "timeout", 0.5)
    endpoint = Endpoint(Address("127.0.0.1", range(1)), lambda: Board(FAMILIES))
    port = int(endpoint.url.split(":")[2].split("/")[0])
    with socket.create_connection(("127.0.0.1", port)):
        threading.Timer(0.2, scrape, [port]).start()
        assert endpoint.wait_for_request(10)
        endpoint.close()
    with pytest.raises(OSError, match="refused"):
        scrape(port)
