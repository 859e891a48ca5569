"""The outer form of a payload: prefix, header, segment table, digest. docs/wire-format.md is its specification.

::

    magic 8 | version u16 | zero u16 | header bytes u32 | tensors u32 | header | table | digest 16 | segments
                                                                         table row: length u64 | checksum u64

All integers are little endian. A segment's checksum is its XXH3-64; the digest is the XXH3-128 of everything before it,
so it covers every segment through the table and names the payload. These find damage, not forgery: TLS and tickets
say who sent a payload. XXH3 runs at memory speed, which SHA-256 does not.

The header is canonical JSON (sorted keys, no blanks, ASCII), padded with blanks so that segments start at a multiple of
16 bytes. Every field is required and no other is allowed; a new field means a new format version.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

import xxhash

from fedllm.codecs.stage import Buffer
from fedllm.errors import (
    ConfigError,
    CorruptPayloadError,
    OversizedPayloadError,
    PayloadVersionError,
    TruncatedPayloadError,
    explain,
)
from fedllm.update import MAX_TENSORS

MAGIC = b"\x89FLP\r\n\x1a\n"
VERSION = 1
MAX_HEADER_BYTES = 16 * 1024
DIGEST_BYTES = 16

PayloadKind = Literal["state", "update"]
KINDS = ("state", "update")

_PREFIX = struct.Struct("<8sHHII")
_ROW = struct.Struct("<QQ")
_ALIGNMENT = 16
_MAX_TEXT = 8192


@dataclass(frozen=True)
class PayloadHeader:
    """What a payload says about itself.

    Attributes:
        kind: ``state`` (a global adapter) or ``update`` (a site's contribution).
        round: The federation's round, 0 before the first.
        layout: Digest of the layout, 64 hexadecimal digits.
        base: Fingerprint of the frozen base that the adapter belongs to.
        pipeline: The pipeline's text with all versions.
        reference: Id of the state that the values are a difference to; empty if they are absolute.
        seed: The run's seed where decoding needs it (`randk`), else 0.
        site_index: The site's number in the round-robin of `segment`, else 0.

    Raises:
        ConfigError: A value is of another type or outside its range.
    """

    kind: PayloadKind
    round: int
    layout: str
    base: str
    pipeline: str
    reference: str = ""
    seed: int = 0
    site_index: int = 0

    def __post_init__(self) -> None:
        reason = _reason_against(self)
        if reason:
            raise ConfigError(explain("a payload header holds an impossible value", found=reason))

    def to_json(self) -> bytes:
        """Return the canonical JSON text."""
        return json.dumps(vars(self), sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _reason_against(header: PayloadHeader) -> str:
    texts = {"layout": header.layout, "base": header.base, "pipeline": header.pipeline, "reference": header.reference}
    whole = {"round": header.round, "site_index": header.site_index}
    reasons = [f"kind={header.kind!r}"] if header.kind not in KINDS else []
    reasons += [f"{key}={value!r}"[:80] for key, value in texts.items() if not _is_text(value)]
    reasons += [f"{key}={value!r}"[:80] for key, value in whole.items() if not _is_int(value, 0, 1 << 31)]
    reasons += [] if _is_int(header.seed, -(1 << 63), 1 << 63) else [f"seed={header.seed!r}"[:80]]
    return ", ".join(reasons)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT


def _is_int(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value < high


@dataclass(frozen=True)
class Head:
    """Everything before the segments.

    Attributes:
        header: The payload's header.
        rows: Length in bytes and XXH3-64 checksum of each segment, in layout order.
    """

    header: PayloadHeader
    rows: tuple[tuple[int, int], ...]

    @property
    def num_bytes(self) -> int:
        """Size of the head, digest included."""
        return (
            _PREFIX.size
            + len(_padded(self.header.to_json(), len(self.rows)))
            + len(self.rows) * _ROW.size
            + DIGEST_BYTES
        )

    def to_bytes(self) -> bytes:
        """Return the head's bytes, digest included."""
        text = _padded(self.header.to_json(), len(self.rows))
        prefix = _PREFIX.pack(MAGIC, VERSION, 0, len(text), len(self.rows))
        body = prefix + text + b"".join(_ROW.pack(*row) for row in self.rows)
        return body + xxhash.xxh3_128_digest(body)


def checksum(segment: Buffer) -> int:
    """Return a segment's checksum."""
    return xxhash.xxh3_64_intdigest(segment)


def _padded(text: bytes, num_tensors: int) -> bytes:
    size = _PREFIX.size + len(text) + num_tensors * _ROW.size + DIGEST_BYTES
    return text + b" " * (-size % _ALIGNMENT)


def read_head(payload: memoryview) -> tuple[Head, bytes]:
    """Read and check a payload's head.

    Returns:
        The head, and the payload's digest.

    Raises:
        TruncatedPayloadError: The bytes end inside the head.
        OversizedPayloadError: The head announces more than this format allows.
        PayloadVersionError: Another version of the format wrote it.
        CorruptPayloadError: It is no payload, or its digest or header is wrong.
    """
    header_bytes, num_tensors = _read_prefix(payload)
    table_at = _PREFIX.size + header_bytes
    digest_at = table_at + num_tensors * _ROW.size
    size = digest_at + DIGEST_BYTES
    _require(payload, size, "its segment table")
    found, expected = xxhash.xxh3_128_digest(payload[:digest_at]), bytes(payload[digest_at:size])
    if found != expected:
        raise CorruptPayloadError(
            explain("a payload's head is damaged", expected=f"digest {expected.hex()}", found=found.hex())
        )
    header = _read_header(bytes(payload[_PREFIX.size : table_at]), num_tensors)
    return Head(header, tuple(_ROW.iter_unpack(payload[table_at:digest_at]))), found


def _read_prefix(payload: memoryview) -> tuple[int, int]:
    if bytes(payload[:8]) != MAGIC[: len(payload)]:
        raise CorruptPayloadError(
            explain("these bytes are not a payload", expected=f"magic {MAGIC.hex()}", found=bytes(payload[:8]).hex())
        )
    _require(payload, _PREFIX.size, "its prefix")
    _, version, zero, header_bytes, num_tensors = _PREFIX.unpack(payload[: _PREFIX.size])
    if version != VERSION:
        raise PayloadVersionError(explain("unknown payload format version", expected=VERSION, found=version))
    if zero:
        raise CorruptPayloadError(explain("a reserved field of the payload is not zero", found=zero))
    if header_bytes > MAX_HEADER_BYTES or num_tensors > MAX_TENSORS:
        raise OversizedPayloadError(
            explain(
                "a payload announces too large a head",
                expected=f"at most {MAX_HEADER_BYTES} header bytes and {MAX_TENSORS} tensors",
                found=f"{header_bytes} and {num_tensors}",
            )
        )
    return header_bytes, num_tensors


def _require(payload: memoryview, num_bytes: int, what: str) -> None:
    if len(payload) < num_bytes:
        raise TruncatedPayloadError(
            explain(f"a payload ends inside {what}", expected=f"{num_bytes} bytes", found=f"{len(payload)} bytes")
        )


def _read_header(text: bytes, num_tensors: int) -> PayloadHeader:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptPayloadError(explain("a payload header is not JSON", found=type(error).__name__)) from error
    expected = sorted(field.name for field in fields(PayloadHeader))
    if not isinstance(values, dict) or sorted(values) != expected:
        found = sorted(values)[:20] if isinstance(values, dict) else type(values).__name__
        raise CorruptPayloadError(explain("a payload header has other fields", expected=expected, found=found))
    try:
        header = PayloadHeader(**cast(dict[str, Any], values))
    except ConfigError as error:
        raise CorruptPayloadError(str(error)) from error
    if _padded(header.to_json(), num_tensors) != text:
        raise CorruptPayloadError(explain("a payload header is not written canonically", found=text[:100]))
    return header
