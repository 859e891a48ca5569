"""``zstd``: Zstandard over a tensor's bytes (RFC 8878), kept only where it makes them fewer.

Bytes: 0 and the bytes as they were, or 1 and one Zstandard frame that states its content's size.
"""

# ruff: noqa: D102 (the methods are described in fedllm.codecs.stage)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import zstandard

from fedllm.codecs.params import at_most, read_int
from fedllm.codecs.stage import Buffer, Kind
from fedllm.errors import CorruptPayloadError, OversizedPayloadError, explain

RAW, FRAME = 0, 1


@dataclass(frozen=True)
class Zstd:
    """Zstandard at a level from 1 to 19."""

    level: int

    name = "zstd"
    version = 1
    kind = Kind.BYTES
    is_linear = True
    is_lossless = True

    @property
    def params(self) -> tuple[str, ...]:
        return (str(self.level),)

    def max_bytes(self, num_bytes: int) -> int:
        return num_bytes + 1

    def encode(self, data: bytes) -> bytes:
        frame = zstandard.ZstdCompressor(level=self.level, write_content_size=True).compress(data)
        return bytes([FRAME]) + frame if len(frame) < len(data) else bytes([RAW]) + data

    def decode(self, buffer: Buffer, max_bytes: int) -> bytes:
        if not len(buffer) or buffer[0] not in (RAW, FRAME):
            raise CorruptPayloadError(explain("compressed bytes start with an unknown mode", where="stage zstd"))
        if buffer[0] == RAW:
            _check_size(len(buffer) - 1, max_bytes)
            return bytes(buffer[1:])
        return _decompress(buffer[1:], max_bytes)


def make_zstd(params: Sequence[str]) -> Zstd:
    """Build the stage ``zstd`` from its level, 3 if none is given."""
    at_most(Zstd.name, params, 1)
    return Zstd(read_int(Zstd.name, params[0] if params else "3", 1, 19, "level"))


def _decompress(frame: Buffer, max_bytes: int) -> bytes:
    try:
        size = zstandard.get_frame_parameters(frame).content_size
        if size == zstandard.CONTENTSIZE_UNKNOWN:
            raise CorruptPayloadError(explain("a frame does not state its size", where="stage zstd"))
        _check_size(size, max_bytes)
        data = zstandard.ZstdDecompressor().decompress(frame, max_output_size=max_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptPayloadError(explain("a Zstandard frame is damaged", found=error, where="stage zstd")) from error
    if len(data) != size:
        raise CorruptPayloadError(explain("a frame has another size than it states", expected=size, found=len(data)))
    return data


def _check_size(found: int, max_bytes: int) -> None:
    if found > max_bytes:
        raise OversizedPayloadError(
            explain(
                "bytes are more than their tensor can need",
                expected=f"at most {max_bytes}",
                found=found,
                where="stage zstd",
            )
        )
