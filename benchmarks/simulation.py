"""Run a federation in Flower's simulation from a benchmark, with a SuperLink of its own, and read what it leaves."""

from __future__ import annotations

import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedllm.runs import RunFolder, read_metrics
from tests.flower_process import flower

DEMO_SITES = 4
_DEMO_SETTINGS = Path(__file__).parents[1] / "deploy" / "demo" / "settings.toml"


def simulate(
    config: Mapping[str, object], num_sites: int, *, cpus_per_site: int = 2, timeout_s: float = 3600
) -> list[dict[str, Any]]:
    """Run one federation to its end and return its events; arguments and errors as for :func:`finished_run`."""
    with finished_run(config, num_sites, cpus_per_site=cpus_per_site, timeout_s=timeout_s) as run:
        return read_metrics(run.metrics)


@contextmanager
def finished_run(
    config: Mapping[str, object], num_sites: int, *, cpus_per_site: int = 2, timeout_s: float = 3600
) -> Iterator[RunFolder]:
    """Run one federation to its end and yield its folder, which is removed afterwards.

    Args:
        config: Run config beside the defaults.
        num_sites: Simulated sites.
        cpus_per_site: Cores that a site takes, which says how many work at a time.
        timeout_s: Seconds for the whole.

    Raises:
        RuntimeError: It did not finish; what it printed is in the message.
    """
    with tempfile.TemporaryDirectory() as temporary, flower(Path(temporary)) as home:
        output = home.run({"name": "benchmark", **config}, num_sites, timeout_s, cpus_per_site=cpus_per_site)
        run = RunFolder(home.folder / "runs" / "benchmark")
        events = read_metrics(run.metrics)
        if not events or events[-1].get("status") != "finished":
            raise RuntimeError(f"the federation did not finish:\n{output}")
        yield run


def demo_settings() -> dict[str, object]:
    """Return what the demo changes of the run config, by flat key."""
    return {
        f"{section}.{name}": value
        for section, values in tomllib.loads(_DEMO_SETTINGS.read_text()).items()
        for name, value in values.items()
    }
