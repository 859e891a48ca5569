"""Messages between server and site: whole, checked, and unreadable ones named."""

from __future__ import annotations

import json

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedllm.errors import TransportError
from fedllm.messages import EvaluateReport, Failure, Hello, Score, parse_message
from fedllm.records import BLOB, RECORD, from_records, to_records
from fedllm.wire.transport import Envelope
from tests.fake_federation import QuadraticSite

HELLO = Hello(run="r", run_folder="/runs/r", config={"num_rounds": 3, "name": "r"})


def test_a_message_survives_flowers_records() -> None:
    introduction = QuadraticSite("site-1", 1).introduce()
    assert from_records(to_records(introduction), "here")[0] == introduction


@given(
    st.binary(max_size=2000), st.dictionaries(st.text(min_size=1), st.one_of(st.text(), st.integers(-(2**62), 2**62)))
)
def test_any_blob_and_any_fields_survive(blob: bytes, fields: dict[str, str | int]) -> None:
    message, envelope = from_records(to_records(HELLO, Envelope(fields, blob)), "here")
    assert message == HELLO
    assert envelope.blob == blob
    assert dict(envelope.fields) == fields


def test_a_message_without_payload_has_none() -> None:
    assert from_records(to_records(HELLO), "here")[1].blob is None


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (RecordDict(), "no fedllm record"),
        (RecordDict({RECORD: ConfigRecord({"other": 1})}), "no fedllm record"),
        (RecordDict({RECORD: ConfigRecord({"message": "{"})}), "cannot be read"),
        (RecordDict({RECORD: ConfigRecord({"message": '{"kind": "attack"}'})}), "attack"),
    ],
)
def test_records_that_are_not_ours_are_named(records: RecordDict, words: str) -> None:
    with pytest.raises(TransportError, match=words):
        from_records(records, "here")


def test_an_array_of_another_kind_is_refused() -> None:
    records = to_records(HELLO)
    array = Array(dtype="object", shape=(1,), stype="numpy.ndarray", data=b"\x80\x04")
    records[BLOB] = ArrayRecord({BLOB: array})
    with pytest.raises(TransportError, match="not ours"):
        from_records(records, "here")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": float("nan")}, "loss"),
        ({"loss": "1e400"}, "loss"),
        ({"accuracy": 1.5}, "accuracy"),
        ({"num_tokens": 0}, "num_tokens"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_score_that_cannot_be_is_refused(change: dict[str, object], words: str) -> None:
    score = {**Score(loss=1.0, accuracy=0.5, num_tokens=3, num_examples=1).model_dump(), **change}
    report = EvaluateReport.model_construct(site="s", round=1, seconds=1.0).model_dump() | {"score": score}
    with pytest.raises(TransportError, match=words):
        parse_message(json.dumps(report), "here")


@pytest.mark.parametrize("site", ["", "../x", "a b", "x" * 65, "-a"])
def test_a_sites_name_that_could_do_harm_is_refused(site: str) -> None:
    report = EvaluateReport(
        site="s", round=1, seconds=1.0, score=Score(loss=1, accuracy=0, num_tokens=1, num_examples=1)
    )
    with pytest.raises(TransportError, match="site"):
        parse_message(json.dumps(report.model_dump() | {"site": site}), "here")


@given(st.text())
def test_any_text_is_a_message_or_a_transport_error(text: str) -> None:
    with pytest.raises(TransportError):
        parse_message(text, "here")


def test_a_reason_longer_than_anyone_reads_is_refused() -> None:
    with pytest.raises(TransportError, match="reason"):
        parse_message(json.dumps({"kind": "failure", "site": "", "error": "E", "reason": "x" * 5000}), "here")
    assert Failure(site="", error="E", reason="x" * 4000)
