"""Run a federation in Flower's simulation from a benchmark, with a SuperLink of its own, and read its events."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.runs import read_metrics
from tests.flower_process import flower


def simulate(
    config: Mapping[str, object], num_sites: int, *, cpus_per_site: int = 2, timeout_s: float = 3600
) -> list[dict[str, Any]]:
    """Run one federation to its end and return its events.

    Args:
        config: Run config beside the defaults.
        num_sites: Simulated sites.
        cpus_per_site: Cores that a site takes, which says how many work at a time.
        timeout_s: Seconds for the whole.

    Raises:
        RuntimeError: It did not finish; what it printed is in the message.
    """
    with tempfile.TemporaryDirectory() as folder, flower(Path(folder)) as home:
        output = home.run({"name": "benchmark", **config}, num_sites, timeout_s, cpus_per_site=cpus_per_site)
        events = read_metrics(home.folder / "runs" / "benchmark" / "metrics.jsonl")
    if not events or events[-1].get("status") != "finished":
        raise RuntimeError(f"the federation did not finish:\n{output}")
    return events
