"""Part a: the stream's round against Flower's and against bare gRPC, in one run."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from benchmarks.wire import raw
from benchmarks.wire.adapter import NUM_ARRAYS
from benchmarks.wire.federation import federation
from benchmarks.wire.flower import flower_rounds
from fedllm.wire.digest import CHUNK_BYTES

NUM_CLIENTS = 2
TURNS = 3
"""Rounds of the stream and of bare gRPC for each of Flower's, which takes longer than all of them."""


def measure(megabytes: int, repeats: int) -> dict[str, object]:
    """Return seconds and ratios."""
    stream, bare, tuned = _stream_and_raw(megabytes, repeats)
    flower = {arrays: flower_rounds(megabytes, arrays, NUM_CLIENTS, repeats) for arrays in (NUM_ARRAYS, 1, 0)}
    many, one, empty = (statistics.median(flower[arrays]) for arrays in (NUM_ARRAYS, 1, 0))
    phases = {name: statistics.median([row[name] for row in stream]) for name in stream[0]}
    moved_s = phases["fetch_s"] + phases["push_s"]
    raw_s, tuned_s = statistics.median(bare), statistics.median(tuned)
    round_s = phases["round_s"]
    return {
        "stream_phases": phases,
        "raw_grpc_s": raw_s,
        "tuned_raw_grpc_s": tuned_s,
        "flower_many_arrays_round_s": many,
        "flower_one_array_round_s": one,
        "flower_empty_round_s": empty,
        "speedup_vs_flower_many_arrays": many / round_s,
        "speedup_vs_flower_one_array": one / round_s,
        "speedup_vs_flower_many_arrays_payload_only": (many - empty) / round_s,
        "speedup_vs_flower_one_array_payload_only": (one - empty) / round_s,
        "fraction_of_raw_grpc": raw_s / moved_s,
        "fraction_of_tuned_raw_grpc": tuned_s / moved_s,
        "stream_megabytes_per_s": 2 * NUM_CLIENTS * megabytes / moved_s,
    }


def _stream_and_raw(megabytes: int, repeats: int) -> tuple[list[dict[str, float]], list[float], list[float]]:
    """Take turns, so that a slow minute of the machine meets all; the first turn warms them and does not count."""
    num_chunks = -(-megabytes * 1_000_000 // CHUNK_BYTES)
    stream, bare, tuned = [], [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        raw.raw_server(is_tuned=False) as bare_server,
        raw.raw_server(is_tuned=True) as tuned_server,
        federation(Path(folder), megabytes, NUM_CLIENTS, NUM_CLIENTS, downlink="fp32", uplink="fp32") as ours,
    ):
        for _ in range(TURNS * repeats + 1):
            stream.append(ours.round())
            bare.append(_raw(bare_server, num_chunks, is_tuned=False))
            tuned.append(_raw(tuned_server, num_chunks, is_tuned=True))
    return stream[1:], bare[1:], tuned[1:]


def _raw(address: str, num_chunks: int, *, is_tuned: bool) -> float:
    """Return the seconds that the same bytes take down and up over bare gRPC."""
    arguments = [(address, num_chunks, is_tuned)] * NUM_CLIENTS
    return sum(raw.measure(work, arguments) for work in (raw.raw_fetch, raw.raw_push))
