"""Laws of the update stream's pure parts: tickets, messages, file names."""

from __future__ import annotations

import base64
import dataclasses
import hmac
import json
import os
import random
import string
import tempfile
from pathlib import Path

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from fedllm.errors import TicketError
from fedllm.wire import updates_pb2 as pb
from fedllm.wire.digest import CHUNK_BYTES, checksum
from fedllm.wire.framing import Framer, read_chunk, read_push
from fedllm.wire.spool import file_name
from fedllm.wire.status import RefusedError
from fedllm.wire.ticket import Ticket, TicketKey

keys = st.binary(min_size=32, max_size=32).map(TicketKey)
names = st.text(max_size=40)
tickets = st.builds(
    Ticket,
    run=names,
    round_=st.integers(0, 1 << 40),
    attempt=st.integers(0, 1000),
    site=names,
    direction=st.sampled_from(["fetch", "push"]),
    max_bytes=st.integers(0, 1 << 60),
    expires_at=st.integers(0, 1 << 40),
    state_id=names,
)


def verify(key: TicketKey, text: str, ticket: Ticket, *, now: float | None = None) -> Ticket:
    return key.verify(
        text, run=ticket.run, direction=ticket.direction, now=ticket.expires_at - 1 if now is None else now
    )


@given(keys, tickets)
def test_a_ticket_says_after_the_journey_what_it_said_before(key: TicketKey, ticket: Ticket):
    assert verify(key, key.issue(ticket), ticket) == ticket


@given(keys, tickets, st.data())
def test_a_ticket_with_one_changed_character_is_refused(key: TicketKey, ticket: Ticket, data: st.DataObject):
    text = key.issue(ticket)
    position = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from(string.printable).filter(lambda char: char != text[position]))
    with pytest.raises(TicketError):
        verify(key, text[:position] + other + text[position + 1 :], ticket)


@given(keys, tickets, st.text(max_size=20))
def test_a_ticket_with_something_added_or_left_out_is_refused(key: TicketKey, ticket: Ticket, more: str):
    text = key.issue(ticket)
    for altered in {text + more, more + text, text.replace(".", "." + more, 1), text[len(more) :]} - {text}:
        with pytest.raises(TicketError):
            verify(key, altered, ticket)


@given(keys, keys, tickets)
def test_a_ticket_of_another_key_is_refused(key: TicketKey, other: TicketKey, ticket: Ticket):
    if key.issue(ticket) == other.issue(ticket):
        return
    with pytest.raises(TicketError, match="not issued by this server"):
        verify(other, key.issue(ticket), ticket)


@given(keys, tickets, tickets)
def test_different_tickets_have_different_texts(key: TicketKey, one: Ticket, other: Ticket):
    other = dataclasses.replace(other, id=one.id)
    assert (key.issue(one) == key.issue(other)) == (one == other)


@given(keys, tickets, st.floats(0, 1e9))
def test_a_ticket_is_good_until_it_expires_and_never_after(key: TicketKey, ticket: Ticket, later: float):
    with pytest.raises(TicketError, match="expired"):
        verify(key, key.issue(ticket), ticket, now=ticket.expires_at + later)


@given(keys, tickets)
def test_a_ticket_serves_its_own_run_and_direction_alone(key: TicketKey, ticket: Ticket):
    other = "push" if ticket.direction == "fetch" else "fetch"
    with pytest.raises(TicketError, match="other direction"):
        key.verify(key.issue(ticket), run=ticket.run, direction=other, now=0)
    with pytest.raises(TicketError, match="another run"):
        key.verify(key.issue(ticket), run=ticket.run + "x", direction=ticket.direction, now=0)


@given(st.text(max_size=200))
def test_any_text_is_refused_without_a_stumble(text: str):
    with pytest.raises(TicketError):
        TicketKey(bytes(32)).verify(text, run="run", direction="push")


def test_a_ticket_is_what_the_documentation_says():
    """An independent reading of the format, from the description alone."""
    ticket = Ticket("run", 3, 1, "clinic-a", "push", 100, 2000, id="ab")
    prefix, claims, code = TicketKey(b"k" * 32).issue(ticket).split(".")
    assert prefix == "fedllm-ticket-v1"
    assert json.loads(base64.urlsafe_b64decode(claims)) == dataclasses.asdict(ticket)
    assert code == hmac.digest(b"k" * 32, f"{prefix}.{claims}".encode(), "sha256").hex()


def test_a_key_never_shows_its_secret():
    assert "6b6b" not in repr(TicketKey(b"k" * 32))
    assert "kkk" not in repr(vars(type(TicketKey(b"k" * 32))))
    assert TicketKey.generate()._secret != TicketKey.generate()._secret


@given(st.integers(0, 1 << 42), st.binary(min_size=1, max_size=70_000), st.integers(0, 100))
@example(CHUNK_BYTES - 1, b"of two blocks", 0)
def test_messages_put_together_by_hand_are_those_of_the_generated_module(offset: int, content: bytes, beyond: int):
    data = content[: CHUNK_BYTES - offset % CHUNK_BYTES]  # a chunk ends with its block
    chunk = pb.Chunk(offset=offset, checksum=checksum(data), data=data)
    expected = {False: chunk.SerializeToString(), True: pb.PushRequest(chunk=chunk).SerializeToString()}
    with tempfile.TemporaryFile(buffering=0) as file:
        os.pwrite(file.fileno(), content + bytes(beyond), offset)
        for is_push, message in expected.items():
            assert Framer(is_push=is_push).read(file.fileno(), offset, offset + len(content)) == (message, len(data))


def test_a_long_file_is_read_chunk_by_chunk_and_no_further_than_its_end(tmp_path: Path):
    path, size = tmp_path / "payload", 2 * CHUNK_BYTES + 5
    path.write_bytes(random.Random(1).randbytes(size))
    framer, offset, read = Framer(is_push=True), 0, b""
    with path.open("rb") as file:
        while offset < size:
            message, num_bytes = framer.read(file.fileno(), offset, size)
            chunk = read_push(message)
            assert (chunk.offset, len(chunk.data), chunk.checksum) == (offset, num_bytes, checksum(chunk.data))
            read, offset = read + chunk.data, offset + num_bytes
        assert read == path.read_bytes()
        with pytest.raises(OSError, match="cut"):
            framer.read(file.fileno(), size, size + 1)


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1), st.binary(max_size=70_000), st.binary(max_size=40))
def test_messages_taken_apart_by_hand_say_what_the_generated_module_reads(
    offset: int, check: int, data: bytes, unknown: bytes
):
    chunk = pb.Chunk(offset=offset, checksum=check, data=data)
    of_a_newer_release = chunk.SerializeToString() + b"\x7a" + bytes([len(unknown)]) + unknown
    for message in (chunk.SerializeToString(), of_a_newer_release):
        read, expected = read_chunk(message), pb.Chunk.FromString(message)
        assert (read.offset, read.checksum, bytes(read.data)) == (expected.offset, expected.checksum, expected.data)
    pushed = read_push(pb.PushRequest(chunk=chunk).SerializeToString())
    assert (pushed.offset, pushed.checksum, bytes(pushed.data)) == (offset, check, data)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_as_the_generated_module_reads_them_or_refused(message: bytes):
    try:
        read = read_chunk(message)
    except RefusedError:
        return
    try:
        expected = pb.Chunk.FromString(message)
    except DecodeError:
        return
    assert (read.offset, read.checksum, bytes(read.data)) == (expected.offset, expected.checksum, expected.data)


@given(st.text(max_size=300), st.text(max_size=300))
def test_file_names_are_safe_and_differ_when_sites_do(one: str, other: str):
    for site in (one, other):
        name = file_name(site)
        assert 0 < len(name) <= 100
        assert set(name) <= set(string.ascii_letters + string.digits + "%-._~")
        assert not name.startswith(".")
    assert (file_name(one) == file_name(other)) == (one == other)
