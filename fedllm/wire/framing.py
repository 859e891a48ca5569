"""Chunks into messages and back into files, the same for both directions.

Messages with chunks are put together by hand, into the bytes that the generated module would give. It would copy a chunk
into its own memory and out again, which costs a sender a quarter of its time; here the chunk is copied once.
"""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.message import Message

from fedllm.wire import updates_pb2 as pb
from fedllm.wire.digest import checksum
from fedllm.wire.part import Part
from fedllm.wire.status import Reason, RefusedError

READ_AHEAD = 2
"""Chunks of one stream that wait while as many are written or read. Handing several to a thread at a time saves a fifth of
a receiver's work."""


def chunk_message(offset: int, data: bytes) -> bytes:
    """Return a serialized ``Chunk`` with its checksum; data must not be empty."""
    return b"".join((_chunk_head(offset, data), data))


def push_message(offset: int, data: bytes) -> bytes:
    """Return a serialized ``PushRequest`` that holds a chunk; data must not be empty."""
    head = _chunk_head(offset, data)
    return b"".join((_PUSH_CHUNK, _varint(len(head) + len(data)), head, data))


def append_chunks(part: Part, chunks: Iterable[pb.Chunk]) -> None:
    """Append chunks that arrived, each if it is the next one and whole.

    Raises:
        RefusedError: One is not; the part ends before it, so the sender can go on from there.
        UpdateError, TransportError: See :meth:`fedllm.wire.part.Part.append`.
    """
    for chunk in chunks:
        data = chunk.data
        if chunk.offset != part.size:
            raise RefusedError(Reason.OUT_OF_STEP, f"The transfer goes on at byte {part.size}, not {chunk.offset}.")
        if checksum(data) != chunk.checksum:
            raise RefusedError(Reason.CORRUPT, f"The chunk at byte {chunk.offset} does not have its checksum.")
        part.append(data)


def serialize(message: Message | bytes) -> bytes:
    """Serialize a message unless it is serialized already."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def _tag(message: type[Message], field: str) -> bytes:
    """Return the key of a length-delimited field."""
    return _varint(message.DESCRIPTOR.fields_by_name[field].number << 3 | 2)


def _chunk_head(offset: int, data: bytes) -> bytes:
    head = pb.Chunk(offset=offset, checksum=checksum(data)).SerializeToString()
    return head + _CHUNK_DATA + _varint(len(data))


def _varint(value: int) -> bytes:
    """Return protobuf's variable-length form of an unsigned number: seven bits a byte, the lowest first."""
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


_CHUNK_DATA = _tag(pb.Chunk, "data")
_PUSH_CHUNK = _tag(pb.PushRequest, "chunk")
