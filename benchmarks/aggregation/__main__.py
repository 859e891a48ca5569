"""Time and memory of every aggregator on the LoRA of a 7B model: rank 16 on all linear layers of 32 blocks, 32 sites.

``python -m benchmarks.aggregation --json``. Updates are drawn, encoded with the run config's default uplink and spooled;
each aggregator then moves a state along them in a process of its own, with the round loop's own code.

- ``aggregators``, by name: ``seconds``, and ``cpu_seconds`` of all threads, which say more on a machine that others use;
  ``peak_rss_bytes``, mapped files included, of which ``rss_before_bytes`` are the process and the state in it (twice: as it
  is, and as sites decoded it); ``needs_all_updates_at_once``: whether updates stay open until the end, to be read tensor by
  tensor, or are read once and dropped; ``blocks``: how many blocks of the model it was measured on. Those that read updates
  once are measured on the whole model, the others on ``--part-blocks`` blocks, since they take one tensor or one layer
  after the other; nothing is extrapolated.
- ``growth``, by name: the peak beyond ``rss_before_bytes`` by number of sites, and ``growth_fraction_of_update``, the
  difference of the last to the first over one update in float32.
- ``core_svd_speedup_vs_dense``: seconds of a dense singular value decomposition of one 4096 x 4096 layer's summed product
  over those of the core decomposition of the same product.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.aggregation import kernel
from benchmarks.aggregation.adapter import HIDDEN
from benchmarks.aggregation.one import write
from benchmarks.aggregation.rules import AT_ONCE, SETTINGS
from benchmarks.common import machine, show

GROWING = ("fedavg", "hetlora", "krum", "median", "fedex")
"""Aggregators whose memory is measured by number of sites: one for each way of reading updates."""

FEWER_SITES = (2, 8)
"""Numbers of sites beside the largest."""


def main() -> None:
    """Measure and print."""
    given = _arguments()
    settings = {
        "blocks": given.blocks,
        "part_blocks": given.part_blocks,
        "sites": given.sites,
        "rank": given.rank,
    }
    result: dict[str, object] = {"machine": machine(), "settings": {**settings, "uplink": given.uplink or "default"}}
    if given.kernel:
        result |= kernel.measure(HIDDEN, given.sites, given.rank, given.repeats)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        rows = {name: _fresh(given, name, given.sites, Path(folder)) for name in given.only}
        growing = [name for name in GROWING if name in given.only and given.growth]
        fewer = {
            name: {count: _fresh(given, name, count, Path(folder)) for count in FEWER_SITES if count < given.sites}
            for name in growing
        }
    result["aggregators"] = rows
    result["growth"] = {name: growth_of({**fewer[name], given.sites: rows[name]}) for name in growing}
    show(result, as_json=given.json)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    yes_or_no = argparse.BooleanOptionalAction
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--blocks", type=int, default=32, help="blocks of the model (default: %(default)s)")
    parser.add_argument(
        "--part-blocks", type=int, default=2, help="the same for aggregators that need all updates at once"
    )
    parser.add_argument("--sites", type=int, default=32, help="sites (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="the adapter's rank (default: %(default)s)")
    parser.add_argument("--uplink", default="", help="codec pipeline of the updates (default: the run config's)")
    parser.add_argument("--only", type=_names, default=tuple(SETTINGS), help="aggregators, separated by commas")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats of the core decomposition")
    parser.add_argument("--kernel", action=yes_or_no, default=True, help="measure the decompositions")
    parser.add_argument("--growth", action=yes_or_no, default=True, help="measure memory by number of sites")
    parser.add_argument("--folder", type=Path, help="where to write the updates, 1.4 GB (default: the system's)")
    return parser.parse_args()


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(SETTINGS):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(SETTINGS)}")
    return names


def _fresh(given: argparse.Namespace, name: str, num_sites: int, folder: Path) -> dict[str, object]:
    """Return one measurement of a new process."""
    blocks = given.part_blocks if name in AT_ONCE else given.blocks
    write(name, blocks, num_sites, given.rank, folder, uplink=given.uplink)
    numbers = [str(number) for number in (blocks, num_sites, given.rank)]
    command = [
        sys.executable,
        "-m",
        "benchmarks.aggregation.one",
        name,
        *numbers,
        str(folder),
        "--uplink",
        given.uplink,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{name}, {num_sites} sites: {row['seconds']:.1f} s", file=sys.stderr, flush=True)
    return row


def growth_of(rows: dict[int, dict[str, object]]) -> dict[str, object]:
    """Return memory by number of sites from measurements by number of sites."""
    beyond = {count: _number(row, "peak_rss_bytes") - _number(row, "rss_before_bytes") for count, row in rows.items()}
    first, last = min(beyond), max(beyond)
    return {
        "beyond_state_bytes": {str(count): value for count, value in beyond.items()},
        "growth_fraction_of_update": (beyond[last] - beyond[first]) / _number(rows[last], "update_bytes"),
    }


def _number(row: dict[str, object], key: str) -> int:
    value = row[key]
    assert isinstance(value, int)
    return value


if __name__ == "__main__":
    main()
