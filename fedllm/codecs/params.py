"""Read the texts between a stage's colons."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedllm.errors import ConfigError, explain

MIN_BLOCK, MAX_BLOCK = 8, 1 << 16


def no_params(name: str, params: Sequence[str]) -> None:
    """Refuse parameters for a stage that has none, with :class:`ConfigError`."""
    at_most(name, params, 0)


def at_most(name: str, params: Sequence[str], count: int) -> None:
    """Refuse more parameters than a stage has, with :class:`ConfigError`."""
    if len(params) > count:
        raise ConfigError(
            explain(
                f"codec stage {name!r} has too many parameters", expected=f"at most {count}", found=":".join(params)
            )
        )


def read_fraction(name: str, params: Sequence[str]) -> float:
    """Return the first parameter as a share in (0, 1], which must be there.

    Raises:
        ConfigError: It is missing or no such number.
    """
    try:
        fraction = float(params[0])
    except (ValueError, IndexError):
        fraction = math.nan
    if not 0 < fraction <= 1:
        raise ConfigError(
            explain(f"codec stage {name!r} needs a share of coordinates", expected="0 < p <= 1", found=":".join(params))
        )
    return fraction


def read_int(name: str, text: str, low: int, high: int, meaning: str) -> int:
    """Return a whole number within bounds.

    Raises:
        ConfigError: It is none.
    """
    if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
        raise ConfigError(
            explain(f"codec stage {name!r} has an impossible {meaning}", expected=f"{low} to {high}", found=text)
        )
    return int(text)


def read_block(name: str, text: str) -> int:
    """Return a block size: a multiple of 8, so that every block starts on a whole byte.

    Raises:
        ConfigError: It is none.
    """
    block = read_int(name, text, MIN_BLOCK, MAX_BLOCK, "block size")
    if block % 8:
        raise ConfigError(
            explain(f"codec stage {name!r} has an impossible block size", expected="a multiple of 8", found=text)
        )
    return block
