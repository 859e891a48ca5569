"""``fedllm runs``: what runs there are and what they came to."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass

from fedllm.cli.command import Command, add_home, add_json, print_json
from fedllm.errors import CheckpointError
from fedllm.manifest import Manifest
from fedllm.runs import RunFolder, list_runs, shell_home
from fedllm.text import clean, table


@dataclass(frozen=True)
class Overview:
    """One run in a line.

    Attributes:
        name: Its name.
        status: ``finished``, ``failed``, ``stopped``, ``running``, ``interrupted`` or ``unreadable``.
        rounds: Rounds done.
        num_rounds: Rounds planned, None where the manifest cannot say.
        best_loss: Lowest held-out loss of a round, None before the first evaluation.
        best_round: That round.
        base_loss: Held-out loss before training.
        created: When the run began, ISO 8601.
        path: Its folder.
    """

    name: str
    status: str
    rounds: int
    num_rounds: int | None
    best_loss: float | None
    best_round: int | None
    base_loss: float | None
    created: str
    path: str


def overview(folder: RunFolder) -> Overview:
    """Read a run's files; what cannot be read is left open."""
    from server_app.events import read_events
    from server_app.results import Results

    manifest = _manifest(folder)
    try:
        results = Results.of(read_events(folder.metrics))
        status: str = results.end.status if results.end else "running" if folder.is_held else "interrupted"
    except CheckpointError:
        results, status = Results(), "unreadable"
    planned = manifest.config.get("num_rounds") if manifest else None
    return Overview(
        name=folder.name,
        status=status,
        rounds=results.last_round,
        num_rounds=planned if isinstance(planned, int) else None,
        best_loss=_finite(results.best.loss if results.best else None),
        best_round=results.best_round,
        base_loss=_finite(results.base.loss if results.base else None),
        created=manifest.created if manifest else "",
        path=str(folder.path),
    )


def _manifest(folder: RunFolder) -> Manifest | None:
    try:
        return Manifest.read(folder.manifest)
    except CheckpointError:
        return None


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None


def _configure(parser: argparse.ArgumentParser) -> None:
    add_home(parser)
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    home = shell_home(arguments.home)
    overviews = [overview(folder) for folder in list_runs(home)]
    if arguments.json:
        print_json([asdict(one) for one in overviews])
    elif overviews:
        head = ("name", "status", "rounds", "base loss", "best loss", "in round", "began")
        print("\n".join(table([head, *map(_cells, overviews)], "<<>>>><")))
    else:
        print(f"no runs in {home / 'runs'}")
    return 0


def _cells(one: Overview) -> tuple[str, ...]:
    rounds = f"{one.rounds}/{one.num_rounds}" if one.num_rounds is not None else str(one.rounds)
    best_round = "-" if one.best_round is None else str(one.best_round)
    began = clean(one.created).replace("T", " ")[:16]
    return clean(one.name), one.status, rounds, _loss(one.base_loss), _loss(one.best_loss), best_round, began


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


COMMAND = Command("runs", "list runs with their results, oldest first", _configure, _run)
