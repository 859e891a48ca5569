"""The methods of ``updates.proto`` for gRPC's generic interface, and the settings of its connections.

gRPC's own code generator would write the same table into a module tied to its version.
"""

from __future__ import annotations

from typing import Any, Protocol

import grpc

from fedllm.wire import updates_pb2 as pb
from fedllm.wire.framing import serialize

SERVICE = "fedllm.wire.v1.Updates"
PORT_KEY = "fedllm-port"
"""Metadata by which a gateway knows the update server of a run."""
MAX_CHUNK_BYTES = 4 << 20
"""Largest chunk that is accepted."""

_MAX_MESSAGE_BYTES = MAX_CHUNK_BYTES + 65536
WINDOW_BYTES = 2 << 20
"""Bytes of a stream that may be on their way. What a broken connection loses is bounded by it, and so is the memory of a
stream at its receiver; a round trip of 100 ms allows 20 MB/s a stream. gRPC's own probing would let it grow."""

_BOTH = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
]

SERVER_OPTIONS: list[tuple[str, int]] = [
    *_BOTH,
    ("grpc.so_reuseport", 0),  # a second server on the same port must fail, not share it
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
]
CLIENT_OPTIONS: list[tuple[str, int]] = [
    *_BOTH,
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new attempt makes a new connection
    ("grpc.enable_retries", 0),  # we retry ourselves, from an offset
]


class Service(Protocol):
    """The server's side of each method."""

    async def fetch(self, request: pb.FetchRequest, context: Any) -> None:
        """Write the state's chunks to the context."""

    async def confirm(self, request: pb.ConfirmRequest, context: Any) -> pb.ConfirmReply:
        """Spend a fetch ticket."""

    async def push_status(self, request: pb.Announcement, context: Any) -> pb.PushStatusReply:
        """Say where to go on."""

    async def push(self, requests: Any, context: Any) -> pb.Receipt:
        """Read an announcement and chunks, both serialized, from the context."""


def handler(service: Service) -> grpc.GenericRpcHandler[Any, Any]:
    """Return what a server needs to answer the methods."""
    methods = {
        "Fetch": grpc.unary_stream_rpc_method_handler(service.fetch, pb.FetchRequest.FromString, serialize),
        "Confirm": grpc.unary_unary_rpc_method_handler(
            service.confirm, pb.ConfirmRequest.FromString, pb.ConfirmReply.SerializeToString
        ),
        "PushStatus": grpc.unary_unary_rpc_method_handler(
            service.push_status, pb.Announcement.FromString, pb.PushStatusReply.SerializeToString
        ),
        "Push": grpc.stream_unary_rpc_method_handler(service.push, bytes, pb.Receipt.SerializeToString),
    }
    return grpc.method_handlers_generic_handler(SERVICE, methods)


class Stub:
    """The client's side of each method."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.fetch = channel.unary_stream(f"/{SERVICE}/Fetch", pb.FetchRequest.SerializeToString, bytes)
        self.confirm = channel.unary_unary(
            f"/{SERVICE}/Confirm", pb.ConfirmRequest.SerializeToString, pb.ConfirmReply.FromString
        )
        self.push_status = channel.unary_unary(
            f"/{SERVICE}/PushStatus", pb.Announcement.SerializeToString, pb.PushStatusReply.FromString
        )
        self.push = channel.stream_unary(f"/{SERVICE}/Push", serialize, pb.Receipt.FromString)
