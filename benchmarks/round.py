"""A simulated round by phase, and the base's load cold and cached.

``python -m benchmarks.round --json`` runs a real federation of four sites (SmolLM2-135M-Instruct, NF4, real text) in
Flower's simulation for two rounds, and loads the base in fresh processes with an empty and with a filled cache.

Keys: ``round_s`` (median over rounds), ``phases`` (seconds by phase, medians), ``bytes_up`` and ``bytes_down`` (payload
bytes of a round and its evaluation, mean over rounds), ``base_load_cold_s``, ``base_load_cached_s`` (medians, imports
excluded), ``base_load_speedup``, ``server_peak_rss_bytes`` (the process that runs the ServerApp and drives Ray).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import machine, show
from benchmarks.simulation import simulate

_LOAD = """
import json, sys
from pathlib import Path
from fedllm.config import RunConfig
from fedllm.model.build import load_base
base = load_base(RunConfig().model, home=Path("."), cache_dir=Path(sys.argv[1]))
print(json.dumps([base.seconds, base.from_cache]))
"""


def load_seconds(cache: Path) -> tuple[float, bool]:
    """Load the default base in a fresh process; return the seconds it took and whether the cache had it."""
    command = [sys.executable, "-c", _LOAD, str(cache)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout
    seconds, from_cache = json.loads(output.strip().splitlines()[-1])
    return float(seconds), bool(from_cache)


def measure_loads(repeats: int) -> dict[str, float]:
    """Return the medians of cold and cached loads."""
    cold, cached = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            first, second = load_seconds(Path(folder)), load_seconds(Path(folder))
        assert (first[1], second[1]) == (False, True), "the cache did not do what it is for"
        cold.append(first[0])
        cached.append(second[0])
    slow, fast = statistics.median(cold), statistics.median(cached)
    return {"base_load_cold_s": slow, "base_load_cached_s": fast, "base_load_speedup": slow / fast}


def measure_rounds(num_rounds: int, local_steps: int) -> dict[str, object]:
    """Run a federation and return its medians by phase."""
    config = {
        "num_rounds": num_rounds,
        "train.local_steps": local_steps,
        "evaluation.local_only": False,
        "evaluation.prompt": "",
    }
    events = simulate(config, num_sites=4)
    rounds = [event for event in events if event["event"] == "round"]
    evaluations = [event for event in events if event["event"] == "evaluation" and event["round"] > 0]
    [end] = [event for event in events if event["event"] == "end"]
    phases = {name: statistics.median(event["phases"][name] for event in rounds) for name in rounds[0]["phases"]}
    phases["evaluate"] = statistics.median(event["seconds"] for event in evaluations)
    return {
        "round_s": statistics.median(event["seconds"] for event in rounds) + phases["evaluate"],
        "phases": phases,
        "bytes_up": sum(event["bytes_up"] for event in rounds) / num_rounds,
        "bytes_down": sum(event["bytes_down"] for event in rounds + evaluations) / num_rounds,
        "server_peak_rss_bytes": end["peak_rss_bytes"],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of the federation")
    parser.add_argument("--steps", type=int, default=4, help="local steps of a round")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of the base's load")
    arguments = parser.parse_args()
    loads = measure_loads(arguments.repeats)
    rounds = measure_rounds(arguments.rounds, arguments.steps)
    show({**rounds, **loads, "local_steps": arguments.steps, "machine": machine()}, as_json=arguments.json)


if __name__ == "__main__":
    main()
