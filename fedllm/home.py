"""Where runs are kept: the folder that holds ``runs/``.

A person expects a run's folder beside them, in the directory where they called ``flwr run``. The ServerApp runs
elsewhere: with a local SuperLink it descends from a detached ``flower-superlink`` that an earlier call started, and has
that call's directory and environment, not this one's. So the caller is looked for among the running processes. Verified
with flwr 1.41: ``flwr run --stream`` lives as long as the run; without ``--stream`` it has mostly ended by then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedllm.provenance import own_project, project

VARIABLE = "FEDLLM_HOME"


def resolve_home(configured: str = "") -> Path:
    """Return the absolute folder that holds ``runs/``, as the ServerApp sees it.

    In order: the configured value; ``FEDLLM_HOME`` of the calling ``flwr run``, then of this process; the directory
    where ``flwr run`` was called; this process's directory, unless that is Flower's copy of an app; the user's home.
    A relative value is taken from the directory that would have been the answer without it.

    Args:
        configured: The run config's ``home``, empty for none.
    """
    caller = _calling_flwr_run()
    folder = caller.folder if caller else _own_folder()
    variables = [caller.environment.get(VARIABLE)] if caller else []
    chosen = next(filter(None, [configured, *variables, os.environ.get(VARIABLE)]), "")
    return (folder / Path(chosen).expanduser()).resolve()


def shell_home(given: str = "") -> Path:
    """Return the absolute folder that holds ``runs/``, as a command in a person's shell sees it.

    In order: the given value, ``FEDLLM_HOME``, the current directory.
    """
    return Path(given or os.environ.get(VARIABLE) or ".").expanduser().resolve()


def default_cache_dir() -> Path:
    """Return where things are kept that can be made again, `FEDLLM_CACHE`, else `~/.cache/fedllm`."""
    return Path(os.environ.get("FEDLLM_CACHE") or Path.home() / ".cache" / "fedllm")


def calling_app() -> Path | None:
    """Return the app directory that the calling ``flwr run`` named, None when no such process is found."""
    caller = _calling_flwr_run()
    return caller.app.resolve() if caller else None


@dataclass(frozen=True)
class _Caller:
    """A running ``flwr run``."""

    app: Path
    folder: Path
    environment: Mapping[str, str]
    started: float


def _calling_flwr_run() -> _Caller | None:
    """Return the youngest ``flwr run`` of this user and app, preferring one that speaks to the same local SuperLink."""
    callers = [caller for caller in _flwr_runs() if _may_be_ours(caller.app)]
    return max(callers, key=lambda caller: (_same_superlink(caller), caller.started), default=None)


def _flwr_runs() -> Iterator[_Caller]:
    own_user = psutil.Process().username()
    for process in psutil.process_iter():
        try:
            app = _app_argument(process.cmdline()) if process.username() == own_user else None
            if app is not None:
                folder = Path(process.cwd())
                yield _Caller(folder / app, folder, process.environ(), process.create_time())
        except (psutil.Error, OSError):  # ended meanwhile, or not ours to look at
            continue


def _app_argument(command: list[str]) -> Path | None:
    """Return APP of ``... flwr run [APP] ...``, None for another command."""
    for program, subcommand, *rest in (command[start:] for start in range(len(command) - 1)):
        if Path(program).name == "flwr" and subcommand == "run":
            return Path(rest[0] if rest and not rest[0].startswith("-") else ".")
    return None


def _may_be_ours(app: Path) -> bool:
    """Say False of another app's directory; an app without a readable directory (of a hub, say) may be ours."""
    found = project(app)
    return found is None or found.get("name") == own_project().get("name")


def _same_superlink(caller: _Caller) -> bool:
    keys = ("FLWR_HOME", "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT")
    return all(caller.environment.get(key) == os.environ.get(key) for key in keys)


def _own_folder() -> Path:
    try:
        own = Path.cwd()
    except FileNotFoundError:  # removed under us
        return Path.home()
    flower = Path(os.environ.get("FLWR_HOME") or "~/.flwr").expanduser().resolve()
    return Path.home() if own.is_relative_to(flower / "apps") else own
