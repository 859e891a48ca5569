"""All strategies on one task beside each other, and beside training alone and training in one place.

``python -m benchmarks.strategies --json`` runs a small real federation (``--task demo``: SmolLM2-135M-Instruct in NF4, four
sites with topics of their own) for every registered strategy and seed, all else equal. A run takes about a minute on two
cores; ``--keep FOLDER`` keeps every finished run, so that an interrupted benchmark goes on.

Keys: ``strategies``, by name: ``heldout_loss`` (of what sites apply after the last round), ``heldout_loss_worst_site``,
``heldout_loss_global`` (of what the federation has in common), ``heldout_loss_personalised`` (after further steps at each
site), ``loss_over_fedavg`` (mean of the differences seed by seed) and ``loss_over_fedavg_range``, ``bytes_up``,
``bytes_down`` (payloads of the whole run), ``server_s`` (choosing, encoding, aggregating), ``server_peak_rss_bytes``,
``exactness_error`` (of the last round's aggregate against the mean of the sites' products), ``seeds`` (the same by seed).
``local_only`` and ``centralised``: ``heldout_loss``, ``heldout_loss_worst_site``. ``refused`` and ``failed``: reasons by
strategy. ``base_loss``, ``num_sites``, ``num_rounds``, ``local_steps``, ``personal_steps``, ``task``, ``machine``.

The server runs in a process of its own, the sites in this one, with the project's own ServerApp, ClientApp and update
stream; only Flower's network is left out.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import machine, show
from benchmarks.strategies.bounds import BOUNDS
from benchmarks.strategies.federation import federate
from benchmarks.strategies.kept import Kept, Row
from benchmarks.strategies.plot import drawing
from benchmarks.strategies.summary import compare, page, summarise
from benchmarks.strategies.task import TASKS, Settings, Task, choices, flat, refusal
from fedllm.config import RunConfig
from fedllm.files import atomic_write

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def measure(task: Task, chosen: dict[str, Settings], seeds: list[int], kept: Kept) -> dict[str, Any]:
    """Run everything, seed by seed, so that an early end leaves all strategies with equally many seeds.

    Args:
        task: What they are given.
        chosen: Settings by name.
        seeds: Seeds of the runs.
        kept: Where finished runs are.
    """
    refused = {name: reason for name, choice in chosen.items() if (reason := refusal(task, choice))}
    rows: dict[str, dict[int, Row]] = {}
    failed: dict[str, str] = {}
    for seed in seeds:
        for piece in _pieces(task, {name: choice for name, choice in chosen.items() if name not in refused}, seed):
            started = time.monotonic()
            try:
                row = kept.obtain(
                    piece.name, seed, flat(piece.config), partial(piece.run, piece.config, task.num_sites)
                )
                rows.setdefault(piece.name, {})[seed] = row
            except RuntimeError as error:
                failed[piece.name] = str(error).strip().splitlines()[-1]
            _say(piece.name, seed, time.monotonic() - started, failed.get(piece.name, ""))
    return {**_results(rows), "refused": refused, "failed": failed}


@dataclass(frozen=True)
class Piece:
    """One run: its name, its settings, and what does it."""

    name: str
    config: RunConfig
    run: Callable[[RunConfig, int], Row]


def _pieces(task: Task, chosen: Mapping[str, Settings], seed: int) -> Iterator[Piece]:
    for name, choice in chosen.items():
        yield Piece(name, task.config(choice, seed), lambda config, num_sites: federate(config, num_sites).row())
    for name, bound in BOUNDS.items():
        yield Piece(name, task.config({}, seed), bound)


def _results(rows: Mapping[str, dict[int, Row]]) -> dict[str, Any]:
    results = {name: summarise(found) for name, found in rows.items()}
    bounds = {name: results.pop(name) for name in BOUNDS if name in results}
    compare(results)
    base_losses = {seed: row["base_loss"] for result in results.values() for seed, row in result["seeds"].items()}
    return {
        "strategies": results,
        **bounds,
        "base_loss": statistics.fmean(base_losses.values()) if base_losses else None,
    }


def _say(name: str, seed: int, seconds: float, reason: str) -> None:
    print(f"{name}, seed {seed}: {seconds:.0f} s{f', failed: {reason}' if reason else ''}", file=sys.stderr, flush=True)


def write(outcome: dict[str, Any], folder: Path) -> None:
    """Write the page and its drawing."""
    command = shlex.join(["python", "-m", "benchmarks.strategies", *sys.argv[1:]])
    atomic_write(folder / "strategies.md", page(outcome, command))
    atomic_write(folder / "strategies.svg", drawing(outcome) + "\n")


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in choices()]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(choices())}")
    return names


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--task", choices=TASKS, default="demo")
    parser.add_argument("--strategies", type=_names, default=list(choices()), metavar="A,B", help="all by default")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[42, 43, 44])
    parser.add_argument("--rounds", type=int, help="in place of the task's")
    parser.add_argument("--steps", type=int, help="local steps of a round, in place of the task's")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep finished runs here and do not repeat them")
    parser.add_argument("--write", action="store_true", help="write the page and the drawing into docs/results")
    options = parser.parse_args()
    task = TASKS[options.task]
    task = replace(task, num_rounds=options.rounds or task.num_rounds, local_steps=options.steps or task.local_steps)
    chosen = {name: choices()[name] for name in options.strategies}
    outcome = {
        **measure(task, chosen, options.seeds, Kept(options.keep)),
        "task": options.task,
        "num_sites": task.num_sites,
        "num_rounds": task.num_rounds,
        "local_steps": task.local_steps,
        "personal_steps": task.personal_steps,
        "machine": machine(),
    }
    if options.write:
        write({**outcome, "seeds": options.seeds}, RESULTS)
    show(outcome, as_json=options.json)
    sys.exit(bool(outcome["failed"]))


if __name__ == "__main__":
    main()
