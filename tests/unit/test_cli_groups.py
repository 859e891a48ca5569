"""Commands that belong together, such as ``fedllm site start`` and ``fedllm site stop``."""

from __future__ import annotations

import argparse

import pytest

from fedllm.cli.command import Command, Group, add_commands
from fedllm.cli.main import main


def _nothing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?")


FIRST, SECOND = (Command(name, f"do {name}", _nothing, lambda _: 0) for name in ("first", "second"))


def _parse(*typed: str, default: str = "") -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_commands(parser, (Group("group", "do things", (FIRST, SECOND), default),))
    return parser.parse_args(typed)


def test_a_command_of_a_group_is_found_and_knows_how_it_was_typed():
    parsed = _parse("group", "second", "thing", "--debug")
    assert (parsed.command, parsed.command_name, parsed.what, parsed.debug) == (SECOND, "group second", "thing", True)


def test_what_names_no_command_belongs_to_the_default_command():
    parsed = _parse("group", "federation.toml", default="first")
    assert (parsed.command, parsed.what) == (FIRST, "federation.toml")
    assert _parse("group", "second", "x", default="first").command is SECOND


def test_a_group_without_a_default_refuses_an_unknown_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        _parse("group", "third")
    assert "invalid choice: 'third' (choose from" in capsys.readouterr().err


def test_an_error_names_the_whole_command(capsys: pytest.CaptureFixture[str]):
    assert main(["site", "stop", "/no/such/folder"]) == 2
    assert capsys.readouterr().err.startswith("fedllm site stop: there is no such folder; in /no/such/folder.")
