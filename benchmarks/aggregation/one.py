"""One aggregation in a process of its own: ``python -m benchmarks.aggregation.one NAME BLOCKS SITES RANK FOLDER``.

The process holds what the server holds (the state, and the same as sites decoded it), is handed the sites' updates as
spooled files and moves the state along them as the round loop does.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.aggregation.adapter import accepted, layout_of, spool, start_of
from benchmarks.aggregation.rules import config_for
from benchmarks.wire.memory import peak_rss_bytes
from fedllm.config import RunConfig
from fedllm.update import Layout
from server_app.folding import moved
from strategies.registry import build_strategy
from strategies.slots import Origin, Strategy


def write(
    name: str, num_blocks: int, num_sites: int, rank: int, folder: Path, *, shrink: int = 1, uplink: str = ""
) -> list[Path]:
    """Write the updates that :func:`measure` aggregates, and return their files; those that are there stay."""
    config, strategy, layout = _setting(name, num_blocks, num_sites, rank, shrink)
    return spool(folder, strategy.work.at(1).sent(layout), num_sites, uplink or config.transport.uplink)


def measure(
    name: str, num_blocks: int, num_sites: int, rank: int, folder: Path, *, shrink: int = 1, uplink: str = ""
) -> dict[str, object]:
    """Aggregate once, from files that best are there already: what writing them leaves behind in memory counts.

    Args:
        name: The aggregator, of :data:`benchmarks.aggregation.rules.SETTINGS`.
        num_blocks: Blocks of the model.
        num_sites: Sites whose updates are aggregated.
        rank: The adapter's.
        folder: Where updates are, or are written.
        shrink: Divides every layer's rows and columns.
        uplink: The uplink's codecs, empty for the run config's default.
    """
    config, strategy, layout = _setting(name, num_blocks, num_sites, rank, shrink)
    work = strategy.work.at(1)
    files = write(name, num_blocks, num_sites, rank, folder, shrink=shrink, uplink=uplink)
    start = start_of(config, strategy, layout)
    origin = Origin(1, start.state.layout, start.state.params, start.broadcast.arrays)
    at_once = strategy.aggregator.start(work.sent(start.state.layout), origin).reads_until_finish
    with tempfile.TemporaryDirectory(dir=folder) as spooled:
        replies = accepted(config, start, work, files, Path(spooled))
        before = _forget_peak()
        started, used = time.perf_counter(), time.process_time()
        after, measured = moved(strategy, start, replies, num_sites)
        seconds, cpu_seconds, peak = time.perf_counter() - started, time.process_time() - used, peak_rss_bytes()
    assert after.round == 1
    assert all(np.isfinite(value).all() for value in after.params.values()), "the next state is finite"
    assert any((after.params[key] != value).any() for key, value in start.state.params.items()), "the state moved"
    share = measured.get("discarded_energy")
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "blocks": num_blocks,
        "peak_rss_bytes": peak,
        "rss_before_bytes": before,
        "update_bytes": work.sent(layout).num_bytes,
        "state_bytes": start.state.layout.num_bytes,
        "needs_all_updates_at_once": at_once,
        **({} if share is None else {"relative_error": math.sqrt(share)}),
    }


def _setting(name: str, num_blocks: int, num_sites: int, rank: int, shrink: int) -> tuple[RunConfig, Strategy, Layout]:
    config = config_for(name, rank, num_sites)
    return config, build_strategy(config), layout_of(num_blocks, rank, shrink=shrink)


def _forget_peak() -> int:
    """Give free memory back, start the count of the peak anew (Linux), and return what is resident."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_rss_bytes()


def main() -> None:
    """Print one measurement as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("blocks", type=int)
    parser.add_argument("sites", type=int)
    parser.add_argument("rank", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--uplink", default="")
    given = parser.parse_args()
    print(json.dumps(measure(given.name, given.blocks, given.sites, given.rank, given.folder, uplink=given.uplink)))


if __name__ == "__main__":
    main()
