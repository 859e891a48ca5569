"""One payload that is arriving: appended to in order, verified as a whole, then handed over."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedllm.errors import CorruptPayloadError, OversizedPayloadError, TransportError, explain
from fedllm.wire.digest import CHUNK_BYTES, Digest, is_digest
from fedllm.wire.files import clear_disk_errors


@dataclass(frozen=True)
class Receipt:
    """Names a payload: what a sender announces and a receiver confirms.

    Attributes:
        size: Its bytes.
        digest: Its name, 32 hexadecimal digits (see :mod:`fedllm.wire.digest`).

    Raises:
        TransportError: The size is negative or the digest is none.
    """

    size: int
    digest: str

    def __post_init__(self) -> None:
        if self.size < 0 or not is_digest(self.digest):
            raise TransportError(explain("a payload is announced wrongly", expected="bytes and a digest", found=self))

    def __str__(self) -> str:
        return f"{self.size} bytes, digest {self.digest[:12]}…"


class Part:
    """A file that grows to an announced payload, from what an earlier part already held.

    Writes are serialized, and after :meth:`close` all of them fail, so another thread can end a writer at any time.

    Args:
        path: The file; need not exist.
        announced: What it has to become.
        deliver: Moves the verified file into place.
    """

    def __init__(self, path: Path, announced: Receipt, deliver: Callable[[Path], None]) -> None:
        self.path, self.announced = path, announced
        self._deliver = deliver
        self._lock = threading.Lock()
        self._closed = False
        self._digest: Digest | None = None
        self._descriptor = -1
        self._closing: weakref.finalize[..., Part] | None = None
        with clear_disk_errors(path):
            self._size = path.stat().st_size if path.exists() else 0
        if self._size > announced.size:
            self.rewind()

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Bytes held, each of them in a chunk whose checksum was right."""
        return self._size

    @property
    def missing(self) -> int:
        """Bytes that have not arrived."""
        return self.announced.size - self._size

    @property
    def closed(self) -> bool:
        """Tell whether writing has ended."""
        return self._closed

    def append(self, chunk: bytes | memoryview, known: int | None = None) -> None:
        """Write the next bytes.

        Args:
            chunk: The bytes.
            known: Their checksum, if it has been computed.

        Raises:
            OversizedPayloadError: More bytes than announced; nothing of the chunk is kept.
            TransportError: The part was closed, or the disk refused.
        """
        with self._writing():
            if len(chunk) > self.missing:
                found = f"at least {self._size + len(chunk)}"
                raise OversizedPayloadError(
                    explain("a payload is longer than announced", expected=f"{self.announced.size} bytes", found=found)
                )
            digest = self._digest_of_held()
            self._write(chunk)
            digest.update(chunk, known)
            self._size += len(chunk)

    def rewind(self) -> None:
        """Forget what is held and begin at the first byte."""
        with self._writing():
            self._close_file()
            self.path.unlink(missing_ok=True)
            self._digest, self._size = None, 0

    def finish(self) -> None:
        """Verify the whole and hand it over; the part is closed.

        Raises:
            CorruptPayloadError: The digest is not the announced one; what was held is discarded.
            TransportError: Bytes are missing (they can still be sent), the part was closed, or the disk refused.
        """
        with self._writing():
            if self.missing:
                raise TransportError(
                    explain("a payload is not complete", expected=self.announced.size, found=self._size)
                )
            found = self._digest_of_held().hexdigest()
            self._closed = True
            self._close_file()
            if found != self.announced.digest:
                self.path.unlink(missing_ok=True)
                raise CorruptPayloadError(
                    explain("a payload has another digest", expected=self.announced.digest, found=found)
                )
            self.path.touch()  # nothing was written where nothing was announced
            self._deliver(self.path)

    def close(self) -> None:
        """Stop writing and keep what is held. Closing twice does nothing."""
        with self._lock:
            self._closed = True
            self._close_file()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock, clear_disk_errors(self.path):
            if self._closed:
                raise TransportError(explain("a transfer was superseded or its round closed", where=self.path.name))
            yield

    def _digest_of_held(self) -> Digest:
        """Return the running hash; after a restart it is computed once from the file."""
        if self._digest is None:
            self._digest = Digest()
            if self._size:
                with self.path.open("rb") as file:
                    while chunk := file.read(CHUNK_BYTES):
                        self._digest.update(chunk)
        return self._digest

    def _write(self, chunk: bytes | memoryview) -> None:
        rest, end = memoryview(chunk), self._size
        descriptor = self._open_file()
        try:
            while rest:
                written = os.pwrite(descriptor, rest, end)
                rest, end = rest[written:], end + written
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(descriptor, self._size)
            raise

    def _open_file(self) -> int:
        """Return the file, opened by the first write and closed with the part, also where the part is just dropped."""
        if self._closing is None or not self._closing.alive:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600)
            self._closing = weakref.finalize(self, os.close, self._descriptor)
        return self._descriptor

    def _close_file(self) -> None:
        if self._closing is not None:
            self._closing()
