"""What the round loop and the client may rely on, over every transport."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from fedllm.errors import CancelledError, FedLLMError, OversizedPayloadError, PayloadError, TransportError
from fedllm.wire.choose import client_transport
from fedllm.wire.client import UpdateClient
from fedllm.wire.inline import InlineClientTransport, InlineServerTransport
from fedllm.wire.server import UpdateServer
from fedllm.wire.spool import Spool
from fedllm.wire.stream import StreamClientTransport, StreamServerTransport
from fedllm.wire.ticket import TicketKey
from fedllm.wire.transport import ClientTransport, Envelope, ServerTransport
from tests.wire_tools import payload

MIB = 1 << 20
LIMIT = 4 * MIB


@dataclass
class Pair:
    folder: Path
    server: ServerTransport
    client: ClientTransport

    def offer(self, site: str = "clinic-a", *, round_: int = 1, state_id: str | None = "state", limit: int = LIMIT):
        return self.server.offer(round_=round_, site=site, state_id=state_id, max_update_bytes=limit)

    def receive(self, reply: Envelope, site: str = "clinic-a", *, round_: int = 1) -> Path:
        return self.server.receive(round_=round_, site=site, reply=reply)

    def update(self, seed: int = 1, size: int = 2 * MIB + 3) -> Path:
        path = self.folder / f"update-{seed}"
        payload(path, size, seed)
        return path


def _inline(folder: Path) -> tuple[ServerTransport, ClientTransport]:
    return InlineServerTransport(folder / "spool"), InlineClientTransport()


def _stream(folder: Path) -> tuple[ServerTransport, ClientTransport]:
    spool = Spool(folder / "spool")
    server = UpdateServer(spool, TicketKey.generate(), "run", ports="0", insecure=True)
    client = StreamClientTransport(partial(UpdateClient, insecure=True, quiet_s=2.0))
    return StreamServerTransport(server, spool, lifetime_s=60), client


TRANSPORTS: dict[str, Callable[[Path], tuple[ServerTransport, ClientTransport]]] = {"flower": _inline, "grpc": _stream}


@pytest.fixture(params=TRANSPORTS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    server, client = TRANSPORTS[request.param](tmp_path)
    payload(tmp_path / "state", MIB + 7)
    server.publish("state", tmp_path / "state")
    server.open_round(1)
    yield Pair(tmp_path, server, client)
    server.close()


def test_a_round_trip_changes_no_byte(pair: Pair):
    instruction = pair.offer()
    state = pair.client.fetch(instruction, pair.folder / "fetched")
    assert state.read_bytes() == (pair.folder / "state").read_bytes()
    update = pair.update()
    received = pair.receive(pair.client.push(instruction, update))
    assert received.read_bytes() == update.read_bytes()
    assert update.exists(), "the client keeps its file"


def test_an_envelope_holds_only_what_a_flower_message_can_carry(pair: Pair):
    instruction = pair.offer()
    for envelope in (instruction, pair.client.push(instruction, pair.update())):
        assert all(type(value) in (str, int, float, bool) for value in envelope.fields.values())
        assert envelope.blob is None or type(envelope.blob) is bytes


def test_the_client_finds_its_transport_in_the_instruction(pair: Pair):
    assert type(client_transport(pair.offer(), UpdateClient)) is type(pair.client)
    with pytest.raises(TransportError, match="expected 'flower' or 'grpc'; found 'pigeon'"):
        client_transport(Envelope({"transport": "pigeon"}), UpdateClient)


def test_several_sites_do_not_mix_and_their_names_are_harmless(pair: Pair):
    sites = ["a", "../a", "a/b", ".", "A b", "ü", "x" * 300, "x" * 299 + "y"]
    updates = {site: pair.update(seed) for seed, site in enumerate(sites)}
    replies = {site: pair.client.push(pair.offer(site), path) for site, path in updates.items()}
    received = {site: pair.receive(reply, site) for site, reply in replies.items()}
    assert len(set(received.values())) == len(sites)
    for site in sites:
        assert received[site].read_bytes() == updates[site].read_bytes()
        assert received[site].is_relative_to(pair.folder / "spool")


def test_one_state_goes_to_many_sites_and_several_states_can_be_published(pair: Pair):
    payload(pair.folder / "other", 1000, seed=5)
    pair.server.publish("other", pair.folder / "other")
    for site, state_id in (("a", "state"), ("b", "other"), ("c", "state")):
        fetched = pair.client.fetch(pair.offer(site, state_id=state_id), pair.folder / f"fetched-{site}")
        assert fetched.read_bytes() == (pair.folder / state_id).read_bytes()


def test_fetching_replaces_an_older_file(pair: Pair):
    (pair.folder / "fetched").write_bytes(b"old and longer" * MIB)
    pair.client.fetch(pair.offer(), pair.folder / "fetched")
    assert (pair.folder / "fetched").read_bytes() == (pair.folder / "state").read_bytes()


def test_an_offer_may_ask_for_an_update_alone_or_give_a_state_alone(pair: Pair):
    update = pair.update()
    assert pair.receive(pair.client.push(pair.offer(state_id=None), update)).read_bytes() == update.read_bytes()
    instruction = pair.offer("clinic-b", limit=0)
    pair.client.fetch(instruction, pair.folder / "fetched")
    with pytest.raises(FedLLMError):
        pair.client.push(instruction, update)
    with pytest.raises(FedLLMError):
        pair.client.fetch(pair.offer(state_id=None), pair.folder / "again")


def test_a_state_that_is_not_published_cannot_be_offered(pair: Pair):
    with pytest.raises(TransportError, match="'nothing' is not published"):
        pair.offer(state_id="nothing")


def test_an_update_over_the_limit_is_refused_before_it_is_sent(pair: Pair):
    with pytest.raises(OversizedPayloadError, match=f"at most {MIB} bytes"):
        pair.client.push(pair.offer(limit=MIB), pair.update(size=MIB + 1))
    exact = pair.update(seed=2, size=MIB)
    assert pair.receive(pair.client.push(pair.offer(limit=MIB), exact)).stat().st_size == MIB


def test_a_site_that_ignores_the_limit_is_refused_by_the_server(pair: Pair):
    instruction = pair.offer(limit=MIB)
    forged = dataclasses.replace(instruction, fields=dict(instruction.fields) | {"max-update-bytes": LIMIT})
    with pytest.raises((OversizedPayloadError, TransportError)):
        pair.receive(pair.client.push(forged, pair.update(size=MIB + 1)))


def test_a_reply_received_twice_gives_the_same_file(pair: Pair):
    reply = pair.client.push(pair.offer(), pair.update())
    assert pair.receive(reply) == pair.receive(reply)


def test_a_reply_that_was_used_up_is_refused(pair: Pair):
    reply = pair.client.push(pair.offer(), pair.update())
    pair.receive(reply).unlink()
    with pytest.raises(TransportError, match="already used"):
        pair.receive(reply)


def test_pushing_again_after_a_lost_reply_is_harmless(pair: Pair):
    update = pair.update()
    lost = pair.client.push(pair.offer(), update)
    again = pair.client.push(pair.offer(state_id=None), update)
    assert again.fields == lost.fields
    assert pair.receive(again).read_bytes() == update.read_bytes()


def test_a_second_different_update_of_a_site_never_replaces_the_first(pair: Pair):
    first, second = pair.update(1), pair.update(2)
    received = pair.receive(pair.client.push(pair.offer(), first))
    with pytest.raises(TransportError):
        pair.receive(pair.client.push(pair.offer(), second))
    assert received.read_bytes() == first.read_bytes()


@pytest.mark.parametrize(
    "forge",
    [
        lambda fields: fields | {"size": fields["size"] + 1},
        lambda fields: fields | {"size": fields["size"] - 1},
        lambda fields: fields | {"digest": "0" * 32},
        lambda fields: fields | {"digest": "not a digest"},
        lambda fields: fields | {"size": -1},
        lambda fields: fields | {"size": str(fields["size"])},
        lambda fields: fields | {"size": True},
        lambda fields: {name: value for name, value in fields.items() if name != "digest"},
        lambda _: {},
    ],
)
def test_a_reply_that_announces_something_else_is_refused_and_the_true_one_still_counts(pair: Pair, forge):
    update = pair.update()
    reply = pair.client.push(pair.offer(), update)
    with pytest.raises((PayloadError, TransportError)):
        pair.receive(Envelope(forge(dict(reply.fields)), reply.blob))
    assert pair.receive(reply).read_bytes() == update.read_bytes()


def test_a_site_cannot_pass_off_what_another_delivered(pair: Pair):
    pair.offer("clinic-a")
    reply = pair.client.push(pair.offer("clinic-b"), pair.update())
    with pytest.raises((PayloadError, TransportError)):
        pair.receive(dataclasses.replace(reply, blob=None), "clinic-a")


def test_an_instruction_whose_payload_is_not_what_it_announces_is_refused(pair: Pair):
    instruction = pair.offer()
    fields = dict(instruction.fields)
    name = "digest" if "digest" in fields else "state-digest"
    with pytest.raises((PayloadError, TransportError)):
        pair.client.fetch(Envelope(fields | {name: "0" * 32}, instruction.blob), pair.folder / "fetched")
    assert not (pair.folder / "fetched").exists()


def test_nothing_is_offered_or_received_outside_an_open_round(pair: Pair):
    reply = pair.client.push(pair.offer(), pair.update())
    pair.server.close_round(1)
    with pytest.raises(TransportError):
        pair.receive(reply)
    for round_ in (1, 2):
        with pytest.raises(TransportError, match=f"round {round_} is not open"):
            pair.offer(round_=round_)
    pair.server.close_round(1)


def test_a_received_file_outlives_its_round(pair: Pair):
    update = pair.update()
    received = pair.receive(pair.client.push(pair.offer(), update))
    pair.server.close_round(1)
    assert received.read_bytes() == update.read_bytes()


def test_what_was_not_received_is_gone_when_the_round_closes(pair: Pair):
    pair.client.push(pair.offer(), pair.update())
    pair.server.close_round(1)
    assert list((pair.folder / "spool").rglob("*.payload")) == []


def test_a_round_opened_anew_knows_nothing_of_the_attempt_before(pair: Pair):
    late = pair.offer()
    pair.receive(pair.client.push(late, pair.update(1)))
    pair.server.close_round(1)
    pair.server.open_round(1)
    second = pair.update(2)
    assert pair.receive(pair.client.push(pair.offer(), second)).read_bytes() == second.read_bytes()
    with pytest.raises((CancelledError, TransportError)):
        pair.receive(pair.client.push(late, pair.update(3)))


def test_two_rounds_can_be_open_and_do_not_mix(pair: Pair):
    pair.server.open_round(2)
    first, second = pair.update(1), pair.update(2)
    late = pair.client.push(pair.offer(round_=1), first)
    early = pair.client.push(pair.offer(round_=2), second)
    assert pair.receive(early, round_=2).read_bytes() == second.read_bytes()
    pair.server.close_round(2)
    assert pair.receive(late, round_=1).read_bytes() == first.read_bytes()
