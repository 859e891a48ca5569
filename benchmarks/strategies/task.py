"""What every strategy is given alike, and under which settings each of them runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.simulation import DEMO_SITES, demo_settings
from fedllm.config import RunConfig, Scalar, flatten, read_run_config
from fedllm.errors import ConfigError
from strategies.compatibility import check_compatibility
from strategies.registry import RECIPES, build_strategy

Settings = dict[str, Scalar]


@dataclass(frozen=True)
class Task:
    """A model, its data, and the work that is done on it.

    Attributes:
        num_sites: Sites of the federation.
        num_rounds: Rounds.
        local_steps: Steps of each site in a round.
        personal_steps: Steps that each site takes for itself after the last round.
        settings: The rest of the run config beside the defaults.
    """

    num_sites: int
    num_rounds: int
    local_steps: int
    personal_steps: int
    settings: Mapping[str, Any]

    def config(self, choice: Mapping[str, Scalar], seed: int) -> RunConfig:
        """Return the run config of one run.

        Raises:
            ConfigError: The choice cannot go with the task.
        """
        config = read_run_config(
            {
                **self.settings,
                "num_rounds": self.num_rounds,
                "train.local_steps": self.local_steps,
                "evaluation.every": self.num_rounds,
                "evaluation.personal_steps": self.personal_steps,
                "rounds.min_sites": self.num_sites,
                "seed": seed,
                **choice,
            }
        )
        check_compatibility(config)
        build_strategy(config)
        return config


_DEMO_TASK = Task(
    num_sites=DEMO_SITES,
    num_rounds=3,
    local_steps=4,
    personal_steps=2,
    settings={
        **demo_settings(),
        "data.max_length": 64,
        "data.max_holdout_examples": 12,
        "train.batch_size": 1,
        "evaluation.local_only": False,
        "evaluation.prompt": "",
        "transport.uplink": "delta|fp32",
        "transport.downlink": "delta|fp32",
    },
)
TASKS: dict[str, Task] = {"demo": _DEMO_TASK}
"""Tasks by name. `demo`: the base and the text of `make demo` (SmolLM2-135M-Instruct in NF4, four sites with topics of
their own), one short sequence a step, fewer held-out examples; nothing is compressed, so that differences are the
strategies'."""

NEEDS: dict[str, Settings] = {
    "feddpa": {"adapter.personal_rank": 8},
    "fedprompt": {"adapter.kind": "prompt", "train.learning_rate": 0.03},
    "fedpeptao": {
        "adapter.kind": "prefix",
        "train.learning_rate": 0.03,
        "strategy.server_optimizer": "adam",
        "strategy.server_learning_rate": 0.01,
    },
}
"""What a recipe needs beside its name."""

VARIANTS: dict[str, Settings] = {
    "fedadam": {"strategy.server_optimizer": "adam", "strategy.server_learning_rate": 0.01},
    "fedbuff": {"rounds.buffer_size": 2, "rounds.min_sites": 2, "num_rounds": 6, "evaluation.every": 6},
    "geometric-median": {"strategy.aggregator": "geometric-median"},
}
"""Choices that are no recipes of their own: FedAvg with another server optimizer or aggregator, or with a server that moves
after every two updates, twice as often."""


def choices() -> dict[str, Settings]:
    """Return the settings of everything that is compared, by name: every registered recipe, and the variants."""
    return {name: {"strategy.name": name, **NEEDS.get(name, {})} for name in sorted(RECIPES)} | VARIANTS


def refusal(task: Task, choice: Mapping[str, Scalar]) -> str:
    """Return why a choice cannot go with a task, empty where it can."""
    try:
        task.config(choice, 0)
    except ConfigError as error:
        return str(error)
    return ""


def flat(config: RunConfig) -> Settings:
    """Return what a config changes of the defaults, as it is kept beside its result."""
    defaults = flatten(RunConfig())
    return {key: value for key, value in flatten(config).items() if value != defaults[key]}
