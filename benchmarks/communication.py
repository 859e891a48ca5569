"""What compression costs in loss on the demo's task.

``python -m benchmarks.communication --json`` runs the demo's federation (four sites, SmolLM2-135M-Instruct, NF4, real text,
the settings of ``deploy/demo/settings.toml``) once per pipeline, all else equal, in Flower's simulation.

Keys: ``pipelines``, by name: ``uplink``, ``downlink``, ``bytes_up``, ``bytes_down`` (payload bytes of the whole run,
over all sites), ``bytes_fraction_of_bf16`` (both ways together), ``heldout_loss`` (after the last round, over all
sites' tokens), ``loss_over_bf16`` (its relative difference to bf16's, positive is worse), ``residual_norm`` (what error
feedback holds back at the end, over the last update's norm, the largest of all sites); ``base_loss``, ``num_rounds``,
``local_steps``, ``seed``.

States travel with ``delta``, as the difference to what a site holds, so that what a coarse downlink drops in one round
travels in the next: a feedback that needs no memory of its own.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

from benchmarks.common import machine, show
from benchmarks.simulation import DEMO_SITES, demo_settings, simulate


@dataclass(frozen=True)
class Choice:
    """How updates and states are encoded.

    Attributes:
        uplink: Pipeline of updates.
        downlink: Pipeline of states.
        feedback: Whether sites add what the uplink dropped to their next update.
    """

    uplink: str
    downlink: str
    feedback: bool = False

    def settings(self) -> dict[str, object]:
        """Return the run config's keys."""
        return {
            "transport.uplink": self.uplink,
            "transport.downlink": self.downlink,
            "transport.error_feedback": self.feedback,
        }


def both(pipeline: str, *, feedback: bool = False) -> Choice:
    """Take one pipeline both ways."""
    return Choice(pipeline, pipeline, feedback)


CHOICES = {
    "bf16": both("delta|bf16"),
    "int8": both("delta|int8:256|zstd:3"),
    "nf4": both("delta|nf4:256|zstd:3"),
    "topk10+nf4+EF": Choice("delta|topk:0.1|nf4:64|rice", "delta|topk:0.25|nf4:64|rice", feedback=True),
    "q2+EF": both("delta|q2:64|zstd:3", feedback=True),
    "topk50+sign+EF": both("delta|topk:0.5|sign:1024|rice", feedback=True),
}


def run(choice: Choice, num_rounds: int, local_steps: int, seed: int) -> dict[str, Any]:
    """Run one federation; return its bytes, loss and residual."""
    config = {
        **demo_settings(),
        **choice.settings(),
        "num_rounds": num_rounds,
        "train.local_steps": local_steps,
        "seed": seed,
        "evaluation.every": num_rounds,
        "evaluation.local_only": False,
        "evaluation.prompt": "",
    }
    events = simulate(config, DEMO_SITES, cpus_per_site=1)
    rounds = [event for event in events if event["event"] == "round"]
    evaluations = [event for event in events if event["event"] == "evaluation"]
    sites = rounds[-1]["sites"].values()
    return {
        "uplink": choice.uplink,
        "downlink": choice.downlink,
        "bytes_up": sum(event["bytes_up"] for event in rounds),
        "bytes_down": sum(event["bytes_down"] for event in rounds + evaluations),
        "heldout_loss": evaluations[-1]["loss"],
        "residual_norm": max(site["residual_norm"] for site in sites),
        "base_loss": evaluations[0]["loss"],
    }


def compare(results: dict[str, dict[str, Any]]) -> None:
    """Add how each pipeline stands to bf16."""
    reference = results["bf16"]
    for row in results.values():
        row["bytes_fraction_of_bf16"] = _bytes(row) / _bytes(reference)
        row["loss_over_bf16"] = row["heldout_loss"] / reference["heldout_loss"] - 1


def _bytes(row: dict[str, Any]) -> int:
    return int(row["bytes_up"] + row["bytes_down"])


def main() -> None:
    """Run all pipelines, or the named ones beside bf16, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", nargs="+", choices=sorted(CHOICES), default=list(CHOICES), help="and bf16")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4, help="local steps of a round")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    names = [name for name in CHOICES if name == "bf16" or name in options.only]
    results = {name: run(CHOICES[name], options.rounds, options.steps, options.seed) for name in names}
    base_losses = {row.pop("base_loss") for row in results.values()}
    assert len(base_losses) == 1, "all runs begin with the same base on the same text"
    assert all(math.isfinite(row["heldout_loss"]) for row in results.values())
    compare(results)
    rest = {"num_rounds": options.rounds, "local_steps": options.steps, "seed": options.seed, "machine": machine()}
    show({"pipelines": results, "base_loss": base_losses.pop(), **rest}, as_json=options.json)


if __name__ == "__main__":
    main()
