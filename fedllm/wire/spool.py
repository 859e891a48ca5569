"""Where pushed payloads land: bounded, verified, and complete or not there at all.

::

    <folder>/incoming/<round>@<site>@<digest>.part    what has arrived, verified chunk by chunk
    <folder>/complete/<round>/<site>.payload          a whole payload, its digest checked
    <folder>/complete/<round>/<site>.receipt          its size and digest
    <folder>/received/<round>/<site>.payload          the same payload once the round loop has taken it

A payload appears in ``complete`` by one rename. A sender that dies leaves a ``.part`` that a later push of the same
payload continues, also after the server was restarted. The receipt makes a repeated push harmless: the same payload is
acknowledged again without being written, another one is refused. Site names come from peers and are escaped.

What is here survives the death of the process, but is not forced to the disk: after a power cut the server resumes from
its checkpoint, begins the round anew, and sites hand in again what they keep until a round is folded.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

from fedllm.errors import TransportError, explain
from fedllm.files import atomic_write
from fedllm.wire.digest import CHUNK_BYTES, digest_file
from fedllm.wire.files import clear_disk_errors
from fedllm.wire.part import Part, Receipt

logger = logging.getLogger(__name__)

MAX_NAME_CHARS = 100


class Spool:
    """A folder of payloads pushed by sites. Safe to use from several threads.

    Args:
        folder: Made if missing; one spool per folder and run.
        max_bytes: Refuse a push that would make the folder larger than this; None for the disk's own bound.
    """

    def __init__(self, folder: Path, *, max_bytes: int | None = None) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._incoming, self._complete, self._received = (
            folder / name for name in ("incoming", "complete", "received")
        )
        self._lock = threading.Lock()
        self._parts: dict[tuple[int, str], Part] = {}
        for path in (self._incoming, self._complete, self._received):
            with clear_disk_errors(path):
                path.mkdir(parents=True, exist_ok=True)

    def payload_path(self, round_: int, site: str) -> Path:
        """Return where a site's whole payload lies until it is taken."""
        return self._complete / str(round_) / f"{file_name(site)}.payload"

    def receipt(self, round_: int, site: str) -> Receipt | None:
        """Return what a site has delivered in a round, or None; known until the round is discarded, taken or not."""
        path = self._receipt_path(round_, site)
        with clear_disk_errors(path):
            if path.exists():
                return Receipt(**json.loads(path.read_text()))
            return self._receipt_of_payload(round_, site)

    def held(self, round_: int, site: str, announced: Receipt) -> int:
        """Return how many bytes of an announced payload are here: where its sender should go on.

        A sender that asks has lost its connection, so what still writes for it is ended first.

        Raises:
            TransportError: The site has already delivered another payload in this round.
        """
        with self._lock, clear_disk_errors(self._incoming):
            self._end_writer(round_, site)
            if self._is_delivered(round_, site, announced):
                return announced.size
            path = self._part_path(round_, site, announced)
            return min(path.stat().st_size, announced.size) if path.exists() else 0

    def begin(self, round_: int, site: str, announced: Receipt) -> Part | None:
        """Open a payload for writing behind the bytes already held, or return None if it has been delivered.

        A site has one part per round: beginning again ends the older writer, and announcing another payload
        discards the older part.

        Raises:
            TransportError: The site has already delivered another payload in this round, or the disk is too full.
        """
        with self._lock:
            self._end_writer(round_, site)
            if self._is_delivered(round_, site, announced):
                return None
            path = self._part_path(round_, site, announced)
            self._discard_other_parts(round_, site, keep=path)
            part = Part(path, announced, partial(self._deliver, round_, site, announced))
            self._parts[round_, site] = part
            self._check_room(part)
            return part

    def store(self, round_: int, site: str, data: bytes, announced: Receipt) -> None:
        """Put a payload that arrived in one piece where pushed ones lie, with the same checks.

        Raises:
            CorruptPayloadError: Its digest is not the announced one.
            OversizedPayloadError: It is longer than announced.
            TransportError: As for :meth:`begin`, or it is shorter than announced.
        """
        if (part := self.begin(round_, site, announced)) is None:
            return
        with part:
            part.rewind()
            for start in range(0, len(data), CHUNK_BYTES):
                part.append(memoryview(data)[start : start + CHUNK_BYTES])
            part.finish()

    def take(self, round_: int, site: str, announced: Receipt) -> Path:
        """Give a delivered payload away; the file is the caller's from now on. Taking twice gives the same path.

        Raises:
            TransportError: The site has delivered nothing or another payload, or the file has been deleted.
        """
        if not self._is_delivered(round_, site, announced):
            raise TransportError(
                explain(f"site {site!r} has not delivered its update of round {round_}", expected=announced)
            )
        source = self.payload_path(round_, site)
        target = self._received / str(round_) / source.name
        with clear_disk_errors(target):
            target.parent.mkdir(exist_ok=True)
            if source.exists():
                source.rename(target)
        if not target.exists():
            raise TransportError(explain(f"the update of {site!r} in round {round_} was already used", where=target))
        return target

    def discard_round(self, round_: int) -> None:
        """Remove everything of one round that was not taken: parts, payloads and receipts."""
        with self._lock, clear_disk_errors(self.folder):
            for key in [key for key in self._parts if key[0] == round_]:
                self._parts.pop(key).close()
            for path in self._incoming.glob(f"{round_}@*.part"):
                path.unlink()
            shutil.rmtree(self._complete / str(round_), ignore_errors=True)

    def _end_writer(self, round_: int, site: str) -> None:
        if (part := self._parts.pop((round_, site), None)) is not None:
            part.close()

    def _is_delivered(self, round_: int, site: str, announced: Receipt) -> bool:
        receipt = self.receipt(round_, site)
        if receipt is not None and receipt != announced:
            problem = f"site {site!r} has already delivered another update in round {round_}"
            raise TransportError(explain(problem, expected=receipt, found=announced))
        return receipt is not None

    def _deliver(self, round_: int, site: str, announced: Receipt, part: Path) -> None:
        """Move a verified part into place; the payload before its receipt, which alone would mean that it was taken."""
        payload = self.payload_path(round_, site)
        payload.parent.mkdir(exist_ok=True)
        part.rename(payload)
        self._write_receipt(round_, site, announced)
        logger.debug("round %d: update of %r is complete: %s", round_, site, announced)

    def _receipt_of_payload(self, round_: int, site: str) -> Receipt | None:
        """Write the receipt that a crash in the middle of :meth:`_deliver` left out."""
        payload = self.payload_path(round_, site)
        if not payload.exists():
            return None
        receipt = Receipt(payload.stat().st_size, digest_file(payload))
        self._write_receipt(round_, site, receipt)
        return receipt

    def _write_receipt(self, round_: int, site: str, receipt: Receipt) -> None:
        atomic_write(self._receipt_path(round_, site), json.dumps(asdict(receipt)), durable=False)

    def _receipt_path(self, round_: int, site: str) -> Path:
        return self.payload_path(round_, site).with_suffix(".receipt")

    def _part_path(self, round_: int, site: str, announced: Receipt) -> Path:
        return self._incoming / f"{round_}@{file_name(site)}@{announced.digest}.part"

    def _discard_other_parts(self, round_: int, site: str, keep: Path) -> None:
        for path in self._incoming.glob(f"{round_}@{file_name(site)}@*.part"):
            if path != keep:
                path.unlink()

    def _check_room(self, part: Part) -> None:
        promised = sum(other.missing for other in self._parts.values() if not other.closed)
        free = shutil.disk_usage(self.folder).free
        if self._max_bytes is not None:
            free = min(free, self._max_bytes - _used_bytes(self.folder))
        if promised > free:
            part.close()
            raise TransportError(
                explain(
                    "the spool has no room for another update",
                    expected=f"{promised} bytes free",
                    found=free,
                    where=self.folder,
                    fix="Free disk space on the server, or let fewer sites take part in a round.",
                )
            ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def file_name(site: str) -> str:
    """Return a file name for a site: readable, safe, and different for different sites."""
    quoted = quote(site, safe="")
    if quoted.startswith("."):
        quoted = "%2E" + quoted[1:]
    if len(quoted) <= MAX_NAME_CHARS:
        return quoted or "%"
    return f"{quoted[: MAX_NAME_CHARS // 2]}%-{sha256(site.encode()).hexdigest()[:32]}"


def _used_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
