"""Real deltas of the demo's sites, for measuring codecs on.

``python -m benchmarks.deltas deltas.safetensors`` runs the demo's federation (SmolLM2-135M-Instruct in NF4, LoRA rank 8 on
q and v, real text, the settings of ``deploy/demo/settings.toml``) with one of its four sites, drawn anew, in each round,
and everything sent as float32. With one site, the state after a round less the state before it is what that site changed,
so the deltas are read from the server's checkpoints. Tensors are named ``round 3/base_model.…``.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.simulation import DEMO_SITES, demo_settings, finished_run
from fedllm.runs import read_metrics
from fedllm.update import Arrays

NUM_ROUNDS = 3
LOCAL_STEPS = 4


def collect(num_rounds: int = NUM_ROUNDS, local_steps: int = LOCAL_STEPS, seed: int = 42) -> Arrays:
    """Run the federation and return every round's delta, float32 by ``round N/name``."""
    config = {
        **demo_settings(),
        "transport.uplink": "delta|fp32",
        "transport.downlink": "fp32",
        "rounds.fraction": 1 / DEMO_SITES,
        "rounds.min_sites": 1,
        "num_rounds": num_rounds,
        "train.local_steps": local_steps,
        "seed": seed,
        "keep_checkpoints": num_rounds + 1,
        "data.max_holdout_examples": 1,  # no time for evaluation, which changes nothing of the training
        "evaluation.every": num_rounds,
        "evaluation.local_only": False,
        "evaluation.prompt": "",
    }
    with finished_run(config, DEMO_SITES, cpus_per_site=1) as run:
        events = read_metrics(run.metrics)
        assert all(len(event["sites"]) == 1 for event in events if event["event"] == "round"), "one site a round"
        return differences(run.checkpoints)


def differences(checkpoints: Path) -> Arrays:
    """Return what each round changed, from a run's checkpoints of consecutive rounds."""
    states = [load_file(folder / "params.safetensors") for folder in sorted(checkpoints.glob("round-*"))]
    return {
        f"round {round_}/{name}": np.asarray(after[name] - before[name], np.float32)
        for round_, (before, after) in enumerate(itertools.pairwise(states), 1)
        for name in after
    }


def by_round(deltas: Arrays) -> list[Arrays]:
    """Return each round's delta by the tensors' own names, empty where the names have no rounds."""
    rounds: dict[int, Arrays] = {}
    for full_name, values in deltas.items():
        prefix, separator, name = full_name.partition("/")
        if not separator or not prefix.startswith("round "):
            return []
        rounds.setdefault(int(prefix.removeprefix("round ")), {})[name] = values
    return [rounds[number] for number in sorted(rounds)]


def main() -> None:
    """Run the federation and write its deltas."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="safetensors file to write")
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    parser.add_argument("--steps", type=int, default=LOCAL_STEPS, help="local steps of a round")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    save_file(collect(options.rounds, options.steps, options.seed), options.file)


if __name__ == "__main__":
    main()
