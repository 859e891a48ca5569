"""Strategies by name.

To add one: write `strategies/<name>.py` with a function `RunConfig -> Strategy` that chooses the four slots, and
`register("<name>", function)` it.
"""

from __future__ import annotations

from collections.abc import Callable

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, explain
from strategies.clustered import clustered
from strategies.fed_sb import fed_sb
from strategies.fedavg import fedavg
from strategies.fedbuff import buffered
from strategies.feddpa import feddpa
from strategies.fedex import fedex
from strategies.fedpeptao import fedpeptao
from strategies.fedper import fedper
from strategies.fedprompt import fedprompt
from strategies.fedprox import fedprox
from strategies.fedrot import fedrot
from strategies.fedsa_lora import fedsa_lora
from strategies.fedsvd import fedsvd
from strategies.ffa_lora import ffa_lora
from strategies.flexlora import flexlora
from strategies.flora import flora
from strategies.florist import florist
from strategies.hetlora import hetlora, zero_padding
from strategies.lora_fair import lora_fair
from strategies.ravan import ravan
from strategies.rolora import rolora
from strategies.scaffold import scaffold
from strategies.slots import Strategy

Recipe = Callable[[RunConfig], Strategy]

RECIPES: dict[str, Recipe] = {
    "clustered": clustered,
    "fed-sb": fed_sb,
    "fedavg": fedavg,
    "feddpa": feddpa,
    "fedex": fedex,
    "fedper": fedper,
    "fedpeptao": fedpeptao,
    "fedprompt": fedprompt,
    "fedprox": fedprox,
    "fedrot": fedrot,
    "fedsa-lora": fedsa_lora,
    "fedsvd": fedsvd,
    "ffa-lora": ffa_lora,
    "flexlora": flexlora,
    "flora": flora,
    "florist": florist,
    "hetlora": hetlora,
    "lora-fair": lora_fair,
    "ravan": ravan,
    "rolora": rolora,
    "scaffold": scaffold,
    "zero-padding": zero_padding,
}


def register(name: str, recipe: Recipe) -> None:
    """Add a recipe.

    Raises:
        ConfigError: The name is taken.
    """
    if name in RECIPES:
        raise ConfigError(explain(f"a strategy named {name!r} is registered already", fix="Choose another name."))
    RECIPES[name] = recipe


def build_strategy(config: RunConfig) -> Strategy:
    """Build the strategy that a run config names.

    Raises:
        ConfigError: No strategy has that name.
    """
    name = config.strategy.name
    if name not in RECIPES:
        known = ", ".join(sorted(RECIPES))
        raise ConfigError(explain("unknown strategy", expected=f"one of {known}", found=name, where="strategy.name"))
    strategy = RECIPES[name](config)
    return buffered(strategy, config.rounds) if config.rounds.buffer_size else strategy
