"""TOML files of our own, read into checked models and written for people."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from fedllm.errors import ConfigError, explain

ModelT = TypeVar("ModelT", bound=BaseModel)


def read_table(path: Path, model: type[ModelT], what: str, fix: str) -> ModelT:
    """Read a TOML file into a model.

    Args:
        path: The file.
        model: What it must fit.
        what: Word for the file in messages.
        fix: Where its keys are explained.

    Raises:
        ConfigError: It cannot be read, is not TOML, or does not fit; every refused key is named.
    """
    try:
        values = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise ConfigError(explain(f"the {what} file cannot be read", found=error.strerror, where=path)) from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise ConfigError(explain(f"the {what} file is not TOML", found=error, where=path)) from error
    try:
        return model.model_validate(values)
    except ValidationError as error:
        known = sorted(set(_keys(model)))
        lines = [_complaint(item, known) for item in error.errors(include_url=False)]
        raise ConfigError(explain("; ".join(lines), where=path, fix=fix)) from error


def table_lines(values: Mapping[str, str | int | float | bool]) -> str:
    """Return scalars under bare keys as lines of TOML; JSON's scalars are TOML's."""
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())


def _complaint(item: Mapping[str, Any], known: list[str]) -> str:
    key = ".".join(str(part + 1) if isinstance(part, int) else part for part in item["loc"]) or "the whole"
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.4)
        return f"{key}: unknown key" + (f", did you mean {near[0]!r}?" if near else "")
    found = "" if item["type"] == "missing" or not item["loc"] else f", found {item['input']!r}"
    return f"{key}: {item['msg'].removeprefix('Value error, ')}{found}"


def _keys(model: type[BaseModel]) -> Iterator[str]:
    for name, info in model.model_fields.items():
        yield name
        for part in (info.annotation, *get_args(info.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _keys(part)
