"""The site's folders: can they be written, is there room, and who else may look."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from client_app.doctor.case import Case
from client_app.doctor.finding import Finding, failure, ok, warning
from fedllm.text import human_bytes

STATE_COPIES = 8
"""Copies of an adapter that the state of a run takes at most: the state held, three rounds' updates and residuals, the
site's own."""

MARGIN_BYTES = 64_000_000


def examine_folders(case: Case) -> Iterator[Finding]:
    """Look at the folders that the site's file names."""
    paths, footprint = case.owner.paths, case.footprint
    base, adapter = (0, 0) if isinstance(footprint, str) else (footprint.base, footprint.adapter)
    fix = "Free some space, or name a folder on another disk as paths.cache_dir."
    yield examine_room("cache folder", paths.cache_dir, base + MARGIN_BYTES, fix)
    fix = "Free some space, or name a folder on another disk as paths.state_dir."
    yield examine_room("state folder", paths.state_dir, STATE_COPIES * adapter + MARGIN_BYTES, fix)
    yield from examine_privacy("state folder", paths.state_dir)


def examine_room(check: str, folder: Path, needed_bytes: int, fix: str) -> Finding:
    """Write a file into a folder, which may not exist yet, and compare what is free with what is needed.

    Args:
        check: Name of the check.
        folder: Where something will be written.
        needed_bytes: How much.
        fix: What to do where there is too little.
    """
    there = existing(folder)
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"fedllm")
        free = shutil.disk_usage(there).free
    except OSError as error:
        message = f"{folder} cannot be written: {error.strerror}"
        return failure(check, message, f"Let the user of the SuperNode write to {there}, or name another folder.")
    facts = {"free_bytes": free, "needed_bytes": needed_bytes}
    message = f"{human_bytes(free)} free in {folder}, about {human_bytes(needed_bytes)} needed"
    if free < needed_bytes:
        return failure(check, message, fix, **facts)
    if free < 2 * needed_bytes:
        return warning(check, message, fix, **facts)
    return ok(check, message, **facts)


def examine_privacy(check: str, folder: Path) -> Iterator[Finding]:
    """Say who else may read a folder that is as confidential as the data; nothing where it does not exist yet."""
    if not folder.is_dir():
        return
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        who = "everybody on this machine" if mode & stat.S_IRWXO else "its group"
        yield warning(check, f"{who} may look into {folder} (mode {mode:o})", f"chmod 700 {folder}")
    elif folder.stat().st_uid != os.geteuid():
        yield warning(check, f"{folder} belongs to another user", "Run the doctor as the user of the SuperNode.")


def existing(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that exists."""
    return next((each for each in (folder, *folder.parents) if each.is_dir()), Path("/"))
