"""Checksums of the update stream, in one place so that both ends compute the same.

- A **chunk** carries XXH3-64. It guards against accident only (a flipped bit, a torn write), is found at once, and
  costs 25 µs per MiB.
- A **payload** is named by BLAKE3. The digest also travels in Flower's authenticated message, so it must bind: nobody,
  a proxy that ends TLS included, can swap a payload for another of the same digest, and "same digest" may be taken as
  "same payload" when a push is repeated. It costs 0.3 ms per MiB, half of what SHA-256 costs with the processor's own
  instructions; hashing at both ends is the largest part of a transfer's work beside gRPC's.
"""

from __future__ import annotations

from pathlib import Path

import blake3
import xxhash

CHUNK_BYTES = 1 << 20
"""Bytes in one chunk of a stream, and in one read of a file."""

DIGEST_BYTES = 32
"""Bytes in a payload's digest."""


def checksum(chunk: bytes | memoryview) -> int:
    """Return the 64-bit checksum of one chunk."""
    return xxhash.xxh3_64_intdigest(chunk)


def new_digest(data: bytes | memoryview = b"") -> blake3.blake3:
    """Return a running digest of a payload; feed it with ``update``."""
    return blake3.blake3(data)


def digest_bytes(data: bytes | memoryview) -> str:
    """Return a payload's digest, 64 lower-case hexadecimal digits."""
    return new_digest(data).hexdigest()


def digest_file(path: Path) -> str:
    """Return the digest of a file's content (see :func:`digest_bytes`)."""
    digest = new_digest()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def is_digest(text: str) -> bool:
    """Tell whether a text has the form of a payload's digest."""
    return len(text) == 2 * DIGEST_BYTES and set(text) <= set("0123456789abcdef")
