"""What a subcommand is. To add one: write a module with a ``COMMAND``, and name it in :mod:`fedllm.cli.main`.

::

    def configure(parser):
        parser.add_argument("name")

    def run(arguments) -> int:
        print(f"hello {arguments.name}")
        return 0

    COMMAND = Command("hello", "greet somebody", configure, run)

Commands that belong together are a :class:`Group` (``fedllm site start``, ``fedllm site stop``). A module imports what it
needs for its work inside functions where that is slow to import, so that ``fedllm --help`` stays quick.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.errors import CheckpointError, explain
from fedllm.runs import RunFolder, list_runs, shell_home


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        name: What is typed.
        summary: One line for the help, starting with a verb in lower case.
        configure: Adds its arguments to its parser.
        run: Does it, and returns the exit status: 0, or 1 where what was asked for failed.
    """

    name: str
    summary: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


@dataclass(frozen=True)
class Group:
    """Commands under a name of their own.

    Attributes:
        name: What is typed before a command's name.
        summary: One line for the help, starting with a verb in lower case.
        commands: Its commands, in the order of the help.
        default: Name of the command that is meant where none is named, empty for no such command.
    """

    name: str
    summary: str
    commands: tuple[Command, ...]
    default: str = ""


def add_commands(
    parser: argparse.ArgumentParser, commands: Sequence[Command | Group], default: str = "", prefix: str = ""
) -> None:
    """Give a parser its subcommands.

    The parsed arguments then hold ``command``, and ``command_name`` as it was typed (``site start``).
    """
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, action=_Subcommands)
    if default:
        assert isinstance(subparsers, _Subcommands)
        subparsers.default_command = default
        # Else an argument of the default command is refused as an unknown command.
        subparsers.choices = None  # type: ignore[assignment]
    for command in commands:
        described = f"{command.summary[0].upper()}{command.summary[1:]}."
        subparser = subparsers.add_parser(command.name, help=command.summary, description=described)
        if isinstance(command, Group):
            add_commands(subparser, command.commands, command.default, f"{prefix}{command.name} ")
            continue
        command.configure(subparser)
        subparser.add_argument("--debug", action="store_true", help="show where an error came from")
        subparser.set_defaults(command=command, command_name=f"{prefix}{command.name}")


# The class has no public name, and typeshed makes it generic where the interpreter does not.
class _Subcommands(argparse._SubParsersAction):  # type: ignore[type-arg]
    """Lets ``fedllm provision federation.toml`` stand for ``fedllm provision make federation.toml``."""

    default_command = ""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        if self.default_command and values[0] not in self._name_parser_map:
            values = [self.default_command, *values]
        super().__call__(parser, namespace, values, option_string)


def add_home(parser: argparse.ArgumentParser) -> None:
    """Add ``--home``."""
    text = "folder that holds runs/ (default: FEDLLM_HOME, else the current directory)"
    parser.add_argument("--home", default="", metavar="FOLDER", help=text)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def find_run(run: str, home: str) -> RunFolder:
    """Return the folder of a run that a person named.

    Args:
        run: A run's name, a path to its folder, or nothing for the newest run.
        home: What ``--home`` was given, empty for nothing.

    Raises:
        CheckpointError: There is no such run.
        ConfigError: The name cannot be a run's.
    """
    if run and (Path(run).is_dir() or "/" in run.rstrip("/")):
        return _at(Path(run).resolve())
    folder = shell_home(home)
    if run:
        return RunFolder.open(folder, run)
    runs = list_runs(folder)
    if not runs:
        fix = "Name the folder that holds runs/ with --home."
        raise CheckpointError(explain("there are no runs", where=folder / "runs", fix=fix))
    return runs[-1]


def _at(path: Path) -> RunFolder:
    folder = RunFolder(path)
    if not folder.manifest.is_file() and not folder.metrics.is_file():
        expected = f"a folder with {folder.manifest.name} or {folder.metrics.name}"
        raise CheckpointError(explain("this is not a run's folder", expected=expected, where=path))
    return folder


def print_json(value: object) -> None:
    """Print a value as indented JSON; what is not finite must be None."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
