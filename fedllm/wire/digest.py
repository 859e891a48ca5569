"""Checksums of the update stream, in one place so that both ends compute the same.

- A **block** is 1 MiB of a payload, the last one what is left; it is also what travels as one chunk. Its checksum is
  XXH3-64: a flipped bit or a torn write is found at once.
- A **payload** is named by XXH3-128 of its blocks' checksums, also in Flower's message: what arrived is the whole of what
  was announced. So a receiver that has checked the chunks has hashed the payload.

Both guard against accident, and run at the speed of memory (25 µs per MiB). Against malice there are TLS, the tickets, and
for a state its name, SHA-256 of what it decodes to (:func:`fedllm.update.digest_arrays`).
"""

from __future__ import annotations

from pathlib import Path

import xxhash

CHUNK_BYTES = 1 << 20
"""Bytes in a block: in one chunk of a stream, and in one read of a file."""

DIGEST_BYTES = 16
"""Bytes in a payload's digest."""

_CHECKSUM_BYTES = 8


def checksum(chunk: bytes | memoryview) -> int:
    """Return the 64-bit checksum of one chunk."""
    return xxhash.xxh3_64_intdigest(chunk)


class Digest:
    """A running digest of a payload, fed in order with pieces of any size."""

    def __init__(self) -> None:
        self._blocks = xxhash.xxh3_128()
        self._begun = xxhash.xxh3_64()
        self._num_begun = 0

    def update(self, data: bytes | memoryview, known: int | None = None) -> None:
        """Take the next bytes.

        Args:
            data: The bytes.
            known: Their checksum, which spares computing it where they are a whole block.
        """
        if known is not None and not self._num_begun and len(data) == CHUNK_BYTES:
            self._blocks.update(known.to_bytes(_CHECKSUM_BYTES, "big"))
            return
        rest = memoryview(data)
        while rest:
            piece = rest[: CHUNK_BYTES - self._num_begun]
            self._begun.update(piece)
            self._num_begun += len(piece)
            rest = rest[len(piece) :]
            if self._num_begun == CHUNK_BYTES:
                self._blocks.update(self._begun.digest())
                self._begun.reset()
                self._num_begun = 0

    def hexdigest(self) -> str:
        """Return the digest of all bytes so far, 32 lower-case hexadecimal digits."""
        blocks = self._blocks.copy()
        if self._num_begun:
            blocks.update(self._begun.digest())
        return blocks.hexdigest()


def digest_bytes(data: bytes | memoryview) -> str:
    """Return a payload's digest (see :meth:`Digest.hexdigest`)."""
    digest = Digest()
    digest.update(data)
    return digest.hexdigest()


def digest_file(path: Path) -> str:
    """Return the digest of a file's content (see :meth:`Digest.hexdigest`)."""
    return survey_file(path)[0]


def survey_file(path: Path) -> tuple[str, list[int]]:
    """Return the digest of a file's content and the checksums of its blocks."""
    digest, checksums = Digest(), list[int]()
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            checksums.append(checksum(block))
            digest.update(block, checksums[-1])
    return digest.hexdigest(), checksums


def is_digest(text: str) -> bool:
    """Tell whether a text has the form of a payload's digest."""
    return len(text) == 2 * DIGEST_BYTES and set(text) <= set("0123456789abcdef")
