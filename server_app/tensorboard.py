"""Scalars as a TensorBoard event file, written without TensorBoard, TensorFlow or torch.

tensorboardX would do it too, but imports torch wherever that is installed: seconds and hundreds of megabytes in a server
that needs neither. The format is small and frozen: TFRecord framing (length, masked CRC-32C of the length, data, masked
CRC-32C of the data; little endian) around ``Event`` protocol buffer messages, of which four fields are used:

    Event   { 1: double wall_time; 2: int64 step; 3: string file_version; 5: Summary summary }
    Summary { 1: repeated Value value }      Value { 1: string tag; 2: float simple_value }
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from server_app.events import AnyEvent, End, Evaluation, LocalOnly, Personalised, Round

_FILE = "events.out.tfevents.{:010d}.fedllm"


class ScalarWriter:
    """Appends scalars to a new event file of a folder; every call reaches the file at once.

    Args:
        folder: Where TensorBoard looks; made if missing.
        started: Wall time of the file's first record, in seconds since 1970; it names the file.
    """

    def __init__(self, folder: Path, started: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = (folder / _FILE.format(int(started))).open("wb")
        self._write(_double(1, started) + _bytes(3, b"brain.Event:2"))

    def add(self, scalars: Mapping[str, float], step: int, wall_time: float) -> None:
        """Write values under their tags; those that are not finite are left out."""
        values = b"".join(
            _bytes(1, _bytes(1, tag.encode()) + _float(2, value))
            for tag, value in scalars.items()
            if math.isfinite(value)
        )
        if values:
            self._write(_double(1, wall_time) + _varint(2 << 3) + _varint(step) + _bytes(5, values))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, record: bytes) -> None:
        length = struct.pack("<Q", len(record))
        self._file.write(length + _masked_crc(length) + record + _masked_crc(record))
        self._file.flush()


def scalars_of(event: AnyEvent) -> tuple[int, dict[str, float]] | None:
    """Return the step and the scalars that an event amounts to, None for an event without any."""
    if isinstance(event, Evaluation):
        return event.round, dict(_evaluation(event))
    if isinstance(event, Round) and event.event == "round":
        return event.round, dict(_round(event))
    if isinstance(event, LocalOnly):
        return 0, {f"local_only_loss/{site}": part.loss for site, part in event.sites.items()}
    if isinstance(event, Personalised):
        return 0, {f"personalised_loss/{site}": part.loss for site, part in event.sites.items()}
    if isinstance(event, End) and event.best_round is not None:
        return 0, {"run/best_round": float(event.best_round)}
    return None


def _evaluation(event: Evaluation) -> Iterator[tuple[str, float]]:
    yield "heldout/loss", event.loss
    yield "heldout/accuracy", event.accuracy
    yield "heldout/worst_loss", event.worst_loss
    if event.attack_success is not None:
        yield "heldout/attack_success", event.attack_success
    if event.central:
        yield "heldout/central_loss", event.central.loss
    for site, part in event.sites.items():
        yield f"heldout_loss/{site}", part.loss
        yield f"heldout_accuracy/{site}", part.accuracy


def _round(event: Round) -> Iterator[tuple[str, float]]:
    yield "train/loss", math.nan if event.train_loss is None else event.train_loss
    yield "train/update_norm", math.nan if event.update_norm is None else event.update_norm
    if event.discarded_energy is not None:
        yield "train/discarded_energy", event.discarded_energy
    yield "round/participants", float(len(event.participants))
    yield "round/rejected", float(len(event.rejected))
    yield "round/seconds", event.seconds
    yield "traffic/bytes_up", float(event.bytes_up)
    yield "traffic/bytes_down", float(event.bytes_down)
    for phase, seconds in event.phases.items():
        yield f"seconds/{phase}", seconds
    for site, part in event.sites.items():
        yield f"train_loss/{site}", part.loss


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _bytes(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _crc_table() -> list[int]:
    table = []
    for entry in range(256):
        for _ in range(8):
            entry = entry >> 1 ^ (0x82F63B78 if entry & 1 else 0)
        table.append(entry)
    return table


_TABLE = _crc_table()


def _masked_crc(data: bytes) -> bytes:
    """Return TFRecord's masked CRC-32C (Castagnoli): rotated right by 15 bits plus a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
