"""Checkpoints: everything needed to go on from a round, written so that a crash leaves the old one or the new one.

A checkpoint is a folder ``round-00003`` with ``params.safetensors``, ``sent.safetensors`` (what the sites decoded last),
one ``optimizer-<moment>.safetensors`` for each of the optimizer's moments, and ``state.json`` with the counters and the
SHA-256 of every other file. Where the sites are in several groups, the further groups have the same files, named
``group-1-params.safetensors`` and so on. It is filled under another name, brought to the disk, and renamed. All draws are
derived from seed and round (:mod:`fedllm.rng`), so no generator's state needs to be kept.

Evolution: ``state.json`` has a ``version``; a release reads the versions it knows and says so otherwise. A key may be
added where its absence has a meaning: before ``moved`` and ``optimizer_counts``, every round moved every tensor; before
``groups`` and ``others``, all sites were in one group.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedllm.agreement import Agreement
from fedllm.errors import CheckpointError, LayoutError, explain
from fedllm.files import sync_folder
from fedllm.update import Arrays, Layout, check_arrays, taken
from fedllm.work import adapter_of
from strategies.slots import OptimizerState

log = logging.getLogger(__name__)

VERSION = 1
_STATE, _PARAMS, _SENT, _PREFIX = "state.json", "params.safetensors", "sent.safetensors", "optimizer-"


@dataclass(frozen=True)
class RunState:
    """What survives a restart of the server.

    Attributes:
        round: Rounds done.
        params: The global adapter after that round, and what the strategy sends beside it.
        sent: What the sites decoded last, the state that the next one is sent as a difference to.
        optimizer: The server optimizer's memory.
        layout: The state's layout: the adapter's tensors, then what the strategy sends beside them.
        target_modules: Names of the adapted modules, for PEFT's config.
        agreement: What every site holds.
        first_id: Name of the state that the federation started from (:func:`fedllm.update.digest_arrays`).
        moved: Names of the tensors that the last round moved, empty for all.
        group: Number of the group of sites whose state it is.
        groups: Group by site, empty while all sites are in one; a site that is not in it belongs to group 0.
        others: The states of groups 1, 2 and so on; empty in those themselves.
    """

    round: int
    params: Arrays
    sent: Arrays
    optimizer: OptimizerState
    layout: Layout
    target_modules: tuple[str, ...]
    agreement: Agreement
    first_id: str
    moved: tuple[str, ...] = ()
    group: int = 0
    groups: Mapping[str, int] = field(default_factory=dict)
    others: tuple[RunState, ...] = ()

    @property
    def branches(self) -> tuple[RunState, ...]:
        """The states of all groups by number."""
        return (self, *self.others)

    def of(self, site: str) -> RunState:
        """Return the state of a site's group."""
        return self.branches[self.groups.get(site, 0)]

    @property
    def adapter(self) -> Arrays:
        """The global adapter alone, without what travels beside it."""
        return taken(self.params, self.adapter_layout)

    @property
    def adapter_layout(self) -> Layout:
        """The adapter's tensors."""
        return adapter_of(self.layout)


def save_checkpoint(folder: Path, state: RunState, keep: int) -> Path:
    """Write a checkpoint and remove older ones beyond `keep`.

    Args:
        folder: The run's folder of checkpoints.
        state: What to keep.
        keep: Checkpoints to leave, at least 1.

    Raises:
        CheckpointError: The disk refuses.
    """
    final, partial = folder / _name(state.round), folder / f".{_name(state.round)}.partial"
    try:
        _remove(partial)
        partial.mkdir(parents=True)
        _write(partial, state)
        _remove(final)
        partial.rename(final)
        sync_folder(folder)
    except OSError as error:
        fix = "Free space or fix permissions, then resume the run."
        raise CheckpointError(explain("a checkpoint cannot be written", found=error, where=final, fix=fix)) from error
    for old in _folders(folder)[:-keep]:
        _remove(old)
    return final


def _write(folder: Path, state: RunState) -> None:
    for branch in state.branches:
        prefix = _of_group(branch.group)
        save_file(branch.params, folder / f"{prefix}{_PARAMS}")
        save_file(branch.sent, folder / f"{prefix}{_SENT}")
        for moment, arrays in branch.optimizer.moments.items():
            save_file(arrays, folder / f"{prefix}{_PREFIX}{moment}.safetensors")
    digests = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    document = {
        "version": VERSION,
        "round": state.round,
        **_counters(state),
        "groups": dict(state.groups),
        "others": [_counters(branch) for branch in state.others],
        "layout": state.layout.to_json(),
        "target_modules": list(state.target_modules),
        "agreement": state.agreement.model_dump(),
        "first_id": state.first_id,
        "files": digests,
    }
    (folder / _STATE).write_text(json.dumps(document, indent=1))
    for path in folder.iterdir():
        _sync_file(path)
    sync_folder(folder)


def _counters(branch: RunState) -> dict[str, object]:
    return {
        "optimizer_step": branch.optimizer.step,
        "optimizer_counts": dict(branch.optimizer.counts),
        "moved": list(branch.moved),
    }


def load_latest(folder: Path) -> RunState | None:
    """Read the newest checkpoint that is whole, None if there is none.

    A damaged checkpoint is named in the log and passed over for the one before it.

    Raises:
        CheckpointError: There are checkpoints, and none can be read.
    """
    candidates = _folders(folder)
    for candidate in reversed(candidates):
        try:
            return _read(candidate)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            log.warning("checkpoint %s cannot be read (%s); trying the one before it", candidate, error)
    if candidates:
        raise CheckpointError(explain("no checkpoint of the run can be read", where=folder, fix="Start a new run."))
    return None


def _read(folder: Path) -> RunState:
    document = json.loads((folder / _STATE).read_text())
    if document["version"] != VERSION:
        raise ValueError(f"checkpoint version {document['version']}, this release reads {VERSION}")
    for name, digest in document["files"].items():
        if _digest(folder / name) != digest:
            raise ValueError(f"{name} does not match its checksum")
    first, *others = (
        _read_branch(folder, document, counters, group)
        for group, counters in enumerate((document, *document.get("others", ())))
    )
    return replace(first, groups=document.get("groups", {}), others=tuple(others))


def _read_branch(folder: Path, document: Mapping[str, Any], counters: Mapping[str, Any], group: int) -> RunState:
    layout, prefix = Layout.from_json(document["layout"]), _of_group(group)
    moments = {
        name.removeprefix(prefix + _PREFIX).removesuffix(".safetensors"): _load_part(folder / name, layout)
        for name in document["files"]
        if name.startswith(prefix + _PREFIX)
    }
    return RunState(
        round=document["round"],
        params=_load(folder / f"{prefix}{_PARAMS}", layout),
        sent=_load(folder / f"{prefix}{_SENT}", layout),
        optimizer=OptimizerState(counters["optimizer_step"], moments, _counts(counters, layout)),
        layout=layout,
        target_modules=tuple(document["target_modules"]),
        agreement=Agreement.model_validate(document["agreement"]),
        first_id=document["first_id"],
        moved=tuple(counters.get("moved", ())),
        group=group,
    )


def _of_group(group: int) -> str:
    """Return what the names of a group's files begin with."""
    return f"group-{group}-" if group else ""


def _counts(counters: Mapping[str, Any], layout: Layout) -> dict[str, int]:
    every_round = dict.fromkeys(layout.names, counters["optimizer_step"])
    return dict(counters.get("optimizer_counts", every_round))


def _load(path: Path, layout: Layout) -> Arrays:
    """Read arrays in the layout's order: sums over them must not depend on how a file sorts its names."""
    return _ordered(load_file(path), layout, path)


def _load_part(path: Path, layout: Layout) -> Arrays:
    """Read arrays of some of the layout's tensors: moments of those that have moved."""
    arrays = load_file(path)
    return _ordered(arrays, layout.only(arrays), path)


def _ordered(arrays: Arrays, layout: Layout, path: Path) -> Arrays:
    try:
        check_arrays(arrays, layout, str(path))
    except LayoutError as error:
        raise ValueError(str(error)) from error
    return taken(arrays, layout)


def _name(round_: int) -> str:
    return f"round-{round_:05d}"


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-[0-9][0-9][0-9][0-9][0-9]")) if folder.is_dir() else []


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
