"""Chunks into messages and back into files, the same for both directions.

Messages with chunks are put together and taken apart by hand; the bytes are those of the generated module. It would copy a
chunk into its own memory and out again at either end, which costs a sender a quarter of its time and a receiver a tenth. A
sender reads a chunk to where its message is put together, so that one copy and no memory but the message's is needed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from google.protobuf.message import Message

from fedllm.wire import updates_pb2 as pb
from fedllm.wire.digest import CHUNK_BYTES, checksum
from fedllm.wire.part import Part
from fedllm.wire.status import Reason, RefusedError

READ_AHEAD = 4
"""Chunks of one stream that wait while as many are written or read. Handing several to a thread at a time saves a fifth of
a receiver's work."""

_HEAD_BYTES = 64
"""Room for everything before a chunk's data."""

_VARINT, _FIXED64, _BYTES = 0, 1, 2


@dataclass(frozen=True)
class Chunk:
    """A ``Chunk`` whose data is still where it arrived."""

    offset: int
    checksum: int
    data: memoryview


class Framer:
    """Makes messages of a file's chunks. Not for several threads at a time; one serves any number of files.

    Args:
        is_push: Make a ``PushRequest`` of each chunk, and no bare ``Chunk``.
    """

    def __init__(self, *, is_push: bool) -> None:
        self._is_push = is_push
        self._buffer = memoryview(bytearray(_HEAD_BYTES + CHUNK_BYTES))

    def read(self, descriptor: int, offset: int, end: int, checksums: Sequence[int] = ()) -> tuple[bytes, int]:
        """Return the serialized message of the next chunk, which ends with its block, and the bytes of the file in it.

        Args:
            descriptor: The file.
            offset: Where the chunk begins.
            end: The file's size.
            checksums: Those of the file's blocks, if they are known.

        Raises:
            OSError: The file cannot be read, or ends before the offset.
        """
        block, before = divmod(offset, CHUNK_BYTES)
        room = self._buffer[_HEAD_BYTES : _HEAD_BYTES + min(CHUNK_BYTES - before, end - offset)]
        num_bytes = os.preadv(descriptor, [room], offset)
        if not num_bytes:
            raise OSError(errno.EIO, "the file was cut while it was sent")
        data = room[:num_bytes]
        is_known = checksums and not before and num_bytes == len(room)
        return self._message(offset, data, checksums[block] if is_known else checksum(data)), num_bytes

    def _message(self, offset: int, data: memoryview, checksum_: int) -> bytes:
        fields = pb.Chunk(offset=offset, checksum=checksum_).SerializeToString()
        head = fields + _CHUNK_DATA + _varint(len(data))
        if self._is_push:
            head = _PUSH_CHUNK + _varint(len(head) + len(data)) + head
        start = _HEAD_BYTES - len(head)
        self._buffer[start:_HEAD_BYTES] = head
        return bytes(self._buffer[start : _HEAD_BYTES + len(data)])


def read_chunk(message: bytes | memoryview) -> Chunk:
    """Read a serialized ``Chunk``.

    Raises:
        RefusedError: It is none.
    """
    fields = dict(_fields(memoryview(message)))
    offset, checksum_, data = (fields.get(key, default) for key, default in _CHUNK_FIELDS.items())
    assert isinstance(offset, int), "the key says so"
    assert isinstance(checksum_, int), "the key says so"
    assert isinstance(data, memoryview), "the key says so"
    return Chunk(offset, checksum_, data)


def read_push(message: bytes) -> Chunk:
    """Read the chunk of a serialized ``PushRequest``.

    Raises:
        RefusedError: It holds none.
    """
    fields = dict(_fields(memoryview(message)))
    inner = fields.get(_PUSH_CHUNK[0])
    if not isinstance(inner, memoryview):
        raise RefusedError(Reason.MALFORMED, "Only chunks follow an announcement.")
    return read_chunk(inner)


def append_chunks(part: Part, chunks: Iterable[Chunk]) -> None:
    """Append chunks that arrived, each if it is the next one and whole.

    Raises:
        RefusedError: One is not; the part ends before it, so the sender can go on from there.
        UpdateError, TransportError: See :meth:`fedllm.wire.part.Part.append`.
    """
    for chunk in chunks:
        if chunk.offset != part.size:
            raise RefusedError(Reason.OUT_OF_STEP, f"The transfer goes on at byte {part.size}, not {chunk.offset}.")
        if checksum(chunk.data) != chunk.checksum:
            raise RefusedError(Reason.CORRUPT, f"The chunk at byte {chunk.offset} does not have its checksum.")
        part.append(chunk.data, chunk.checksum)


def serialize(message: Message | bytes) -> bytes:
    """Serialize a message unless it is serialized already."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def _fields(view: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield key and value of each field of a message; the key is the field's number and wire type as they travel."""
    position = 0
    while position < len(view):
        key, position = _read_varint(view, position)
        if key & 7 == _VARINT:
            value, position = _read_varint(view, position)
            yield key, value
            continue
        size = 8
        if key & 7 == _BYTES:
            size, position = _read_varint(view, position)
        elif key & 7 != _FIXED64:
            raise _malformed()
        field, position = view[position : position + size], position + size
        if len(field) != size:
            raise _malformed()
        yield key, int.from_bytes(field, "little") if key & 7 == _FIXED64 else field


def _read_varint(view: memoryview, position: int) -> tuple[int, int]:
    """Read protobuf's variable-length form of an unsigned number of 64 bits; return it and where it ends."""
    value = 0
    for index, byte in enumerate(view[position : position + 10]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position + index + 1
    raise _malformed()


def _malformed() -> RefusedError:
    return RefusedError(Reason.MALFORMED, "A message cannot be read.")


def _varint(value: int) -> bytes:
    """Write what :func:`_read_varint` reads: seven bits a byte, the lowest first."""
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _key(message: type[Message], field: str, wire_type: int) -> int:
    return message.DESCRIPTOR.fields_by_name[field].number << 3 | wire_type


_CHUNK_FIELDS: dict[int, int | memoryview] = {
    _key(pb.Chunk, "offset", _VARINT): 0,
    _key(pb.Chunk, "checksum", _FIXED64): 0,
    _key(pb.Chunk, "data", _BYTES): memoryview(b""),
}
_CHUNK_DATA = _varint(_key(pb.Chunk, "data", _BYTES))
_PUSH_CHUNK = _varint(_key(pb.PushRequest, "chunk", _BYTES))
