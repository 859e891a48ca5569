"""``fedllm config``: every setting of a run with its default and meaning, generated from :mod:`fedllm.config`."""

from __future__ import annotations

import argparse
import inspect
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import UnionType
from typing import Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedllm.cli.command import Command, add_json, print_json
from fedllm.config import RunConfig, Scalar, describe
from fedllm.text import pad, wrap

_BOUNDS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}
_TYPES = {bool: "true or false", int: "whole number", float: "number", str: "text"}
_UNITS = {"_s": "seconds", "_bytes": "bytes", "_tokens": "tokens"}


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        key: Its key in the run config.
        default: Its default.
        unit: Its unit where its name tells, else empty.
        allowed: What it may be, in words.
        meaning: What it does.
    """

    key: str
    default: Scalar
    unit: str
    allowed: str
    meaning: str

    @property
    def section(self) -> str:
        """The part of the key before its last dot, empty at the top."""
        return self.key.rpartition(".")[0]


def run_settings() -> list[Setting]:
    """Return every setting of a run config in order."""
    return [_setting(key, default, meaning) for key, default, meaning in describe(RunConfig)]


def _setting(key: str, default: object, meaning: str) -> Setting:
    assert isinstance(default, Scalar), "Flower's run config holds scalars only"
    unit = next((unit for suffix, unit in _UNITS.items() if key.endswith(suffix)), "")
    return Setting(key, default, unit, _allowed(_field(key)), meaning)


def _field(key: str) -> FieldInfo:
    *sections, name = key.split(".")
    return _model(".".join(sections)).model_fields[name]


def _model(section: str) -> type[BaseModel]:
    model: type[BaseModel] = RunConfig
    for name in filter(None, section.split(".")):
        model = type(model.model_fields[name].default)
    return model


def _allowed(field: FieldInfo) -> str:
    if get_origin(field.annotation) in (Union, UnionType):
        return " or ".join(_allowed(FieldInfo.from_annotation(choice)) for choice in get_args(field.annotation))
    if get_origin(field.annotation) is Literal:
        return ", ".join(str(value) for value in get_args(field.annotation))
    kind = _TYPES.get(field.annotation, "") if isinstance(field.annotation, type) else ""
    return " ".join([kind, " and ".join(_bounds(field))]).strip()


def _bounds(field: FieldInfo) -> Iterator[str]:
    for rule in field.metadata:
        if type(rule) in _BOUNDS:
            name, mark = _BOUNDS[type(rule)]
            yield f"{mark} {getattr(rule, name)}"


def as_toml() -> str:
    """Return the table for ``pyproject.toml`` that gives every setting its default, as Flower wants it."""
    lines = ["[tool.flwr.app.config]"]
    section = ""
    for setting in run_settings():
        if setting.section != section:
            section = setting.section
            lines.append(f"# {_about(section)}")
        lines.append(f"{setting.key} = {toml_value(setting.default)}")
    return "\n".join(lines) + "\n"


def toml_value(value: Scalar) -> str:
    """Write a scalar in TOML. JSON's strings, booleans and numbers are TOML's too."""
    return json.dumps(value, ensure_ascii=False)


def _about(section: str) -> str:
    """Return the first sentence of a section's documentation."""
    text = " ".join((inspect.getdoc(_model(section)) or "").split())
    return text.partition(". ")[0].rstrip(".") + "."


_INTRO = """\
# Configuration

Every setting of a run, its default and its meaning. This page is made by `fedllm config --format markdown`; the text comes
from the models in `fedllm/config.py` and `fedllm/model/spec.py`.

Settings are given to Flower when a run is submitted, separated by spaces:

```bash
flwr run . --stream --run-config 'num_rounds=10 train.learning_rate=5e-4 strategy.server_optimizer="adam"'
```

or in a TOML file, `flwr run . --run-config my-run.toml`. An unknown key ends the run before anything is sent, and the error
names the nearest known key. What a data owner decides about the own site is not here: it stands in the site's own file.
"""


def as_markdown() -> str:
    """Return the page ``docs/configuration.md``."""
    settings = run_settings()
    pages = [_INTRO]
    for section in dict.fromkeys(setting.section for setting in settings):
        title = f"## `{section}`" if section else "## Top level"
        about = " ".join((inspect.getdoc(_model(section)) or "").split())
        rows = ["| key | default | values | meaning |", "|---|---|---|---|"]
        rows += [_markdown_row(setting) for setting in settings if setting.section == section]
        pages.append("\n".join([title, "", about, "", *rows, ""]))
    return "\n".join(pages)


def _markdown_row(setting: Setting) -> str:
    allowed = setting.allowed + (f", in {setting.unit}" if setting.unit else "")
    cells = (f"`{setting.key}`", f"`{toml_value(setting.default)}`", allowed, setting.meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def as_text(columns: int) -> str:
    """Return every setting for a terminal of this many columns."""
    settings = run_settings()
    indent = 2 + max(len(setting.key) for setting in settings)
    return "\n".join(line for setting in settings for line in _text_lines(setting, indent, columns)) + "\n"


def _text_lines(setting: Setting, indent: int, columns: int) -> Iterator[str]:
    allowed = setting.allowed + (f", in {setting.unit}" if setting.unit else "")
    body = [f"{toml_value(setting.default)}  ({allowed})", *wrap(setting.meaning, max(30, columns - indent))]
    for number, line in enumerate(body):
        yield pad("" if number else setting.key, indent) + line


def _configure(parser: argparse.ArgumentParser) -> None:
    text = "text for a terminal (default), markdown for docs/configuration.md, toml for pyproject.toml"
    parser.add_argument("--format", choices=("text", "markdown", "toml"), default="text", help=text)
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.json:
        print_json([asdict(setting) for setting in run_settings()])
    elif arguments.format == "text":
        print(as_text(shutil.get_terminal_size((100, 24)).columns), end="")
    else:
        print(as_toml() if arguments.format == "toml" else as_markdown(), end="")
    return 0


COMMAND = Command("config", "explain every setting of a run", _configure, _run)
