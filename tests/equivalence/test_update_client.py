"""A client of the update service written from docs/wire-format.md alone: grpc, the .proto file, and nothing of ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import xxhash
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_tools import protoc

import fedllm.wire
from fedllm.wire.server import UpdateServer
from fedllm.wire.spool import Spool
from fedllm.wire.stream import StreamServerTransport
from fedllm.wire.ticket import TicketKey
from fedllm.wire.transport import Envelope

PACKAGE = "fedllm.wire.v1"
CHUNK = 1 << 20


def digest_of(payload: bytes) -> str:
    """Return a payload's digest as the page defines it."""
    blocks = [payload[start : start + CHUNK] for start in range(0, len(payload), CHUNK)]
    return xxhash.xxh3_128(b"".join(xxhash.xxh3_64_intdigest(block).to_bytes(8, "big") for block in blocks)).hexdigest()


class Client:
    """Fetches and pushes as the page says."""

    def __init__(self, fields: dict[str, Any], types: dict[str, Any]) -> None:
        self.fields, self.types = fields, types
        self.channel = grpc.insecure_channel(fields["address"])
        self.metadata = (("fedllm-port", str(fields["port"])),)

    def call(self, kind: str, method: str, reply: str, argument: Any) -> Any:
        serialize, parse = (lambda message: message.SerializeToString()), self.types[reply].FromString
        rpc = getattr(self.channel, kind)(f"/{PACKAGE}.Updates/{method}", serialize, parse)
        return rpc(argument, metadata=self.metadata)

    def fetch(self, held: bytes = b"") -> bytes:
        ticket, state = self.fields["fetch-ticket"], held
        request = self.types["FetchRequest"](ticket=ticket, offset=len(held))
        for chunk in self.call("unary_stream", "Fetch", "Chunk", request):
            assert chunk.offset == len(state)
            assert xxhash.xxh3_64_intdigest(chunk.data) == chunk.checksum
            state += chunk.data
        assert len(state) == self.fields["state-size"]
        assert digest_of(state) == self.fields["state-digest"]
        self.call("unary_unary", "Confirm", "ConfirmReply", self.types["ConfirmRequest"](ticket=ticket))
        return state

    def push(self, update: bytes, stop_at: int | None = None) -> Any:
        digest = digest_of(update)
        said = self.types["Announcement"](ticket=self.fields["push-ticket"], size=len(update), digest=digest)
        status = self.call("unary_unary", "PushStatus", "PushStatusReply", said)
        if status.delivered:
            return status
        said.offset = status.offset
        return self.call("stream_unary", "Push", "Receipt", self.messages(said, update[:stop_at]))

    def messages(self, said: Any, update: bytes) -> Iterator[Any]:
        yield self.types["PushRequest"](announcement=said)
        for offset in range(said.offset, len(update), CHUNK):
            data = update[offset : offset + CHUNK]
            chunk = self.types["Chunk"](offset=offset, checksum=xxhash.xxh3_64_intdigest(data), data=data)
            yield self.types["PushRequest"](chunk=chunk)


@pytest.fixture(scope="module")
def types(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Compile the .proto file into message classes of a pool of their own."""
    folder, source = tmp_path_factory.mktemp("proto"), Path(fedllm.wire.__file__).parent
    compiled = folder / "updates.bin"
    assert protoc.main(["", f"-I{source}", f"--descriptor_set_out={compiled}", "updates.proto"]) == 0
    pool = descriptor_pool.DescriptorPool()
    file = descriptor_pb2.FileDescriptorSet.FromString(compiled.read_bytes()).file[0]
    pool.Add(file)
    names = [message.name for message in file.message_type]
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in names}


@pytest.fixture
def transport(tmp_path: Path) -> Iterator[StreamServerTransport]:
    spool = Spool(tmp_path / "spool")
    server = UpdateServer(spool, TicketKey.generate(), "run", ports="0", insecure=True)
    made = StreamServerTransport(server, spool, lifetime_s=60)
    made.open_round(1)
    yield made
    made.close()


STATE, UPDATE = bytes(range(256)) * 10_000, bytes(range(255, -1, -1)) * 12_345


@pytest.fixture
def client(transport: StreamServerTransport, tmp_path: Path, types: dict[str, Any]) -> Client:
    (tmp_path / "state").write_bytes(STATE)
    transport.publish("state", tmp_path / "state")
    offer = transport.offer(round_=1, site="clinic-a", state_id="state", max_update_bytes=len(UPDATE))
    return Client(dict(offer.fields), types)


def receive(transport: StreamServerTransport, update: bytes) -> bytes:
    reply = Envelope({"transport": "grpc", "size": len(update), "digest": digest_of(update)})
    return transport.receive(round_=1, site="clinic-a", reply=reply).read_bytes()


def test_the_client_of_the_page_fetches_and_pushes(client: Client, transport: StreamServerTransport) -> None:
    assert client.fetch(held=STATE[: CHUNK + 17]) == STATE
    receipt = client.push(UPDATE)
    assert (receipt.size, receipt.digest) == (len(UPDATE), digest_of(UPDATE))
    assert receive(transport, UPDATE) == UPDATE


def test_the_client_of_the_page_goes_on_after_a_cut(client: Client, transport: StreamServerTransport) -> None:
    with pytest.raises(grpc.RpcError) as cut:
        client.push(UPDATE, stop_at=2 * CHUNK)
    assert cut.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert ("fedllm-reason", "out-of-step") in cut.value.trailing_metadata()
    assert client.push(UPDATE).size == len(UPDATE)
    assert client.push(UPDATE).delivered, "pushing again finds the work done"
    assert receive(transport, UPDATE) == UPDATE


def test_the_client_of_the_page_is_told_why_it_is_refused(client: Client) -> None:
    client.fields["push-ticket"] = client.fields["fetch-ticket"]
    with pytest.raises(grpc.RpcError) as refused:
        client.push(UPDATE)
    assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert ("fedllm-reason", "ticket") in refused.value.trailing_metadata()
