"""One federation: a server in a process of its own, and real sites in this one, which share one loaded base."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flwr.supercore.task_identity import TaskIdentity

from benchmarks.strategies.observed import exactness_error
from benchmarks.strategies.task import flat
from fedllm.config import RunConfig, Scalar
from fedllm.runs import read_metrics
from tests.observed_sites import ObservedSite, observed_sites

REPOSITORY = Path(__file__).parents[2]
ENDING_S = 600.0
"""Seconds in which a server ends after its last word."""


@dataclass(frozen=True)
class Federated:
    """What a federation left.

    Attributes:
        events: Lines of its metrics file.
        sites: The sites, with what they applied.
        server_peak_rss_bytes: Most memory that the server's process held.
    """

    events: list[dict[str, Any]]
    sites: list[ObservedSite]
    server_peak_rss_bytes: int

    def row(self) -> dict[str, Any]:
        """Return what is compared; `None` where a strategy has no such thing."""
        rounds, evaluations = self._events("round"), self._events("evaluation")
        last = evaluations[-1]
        [own] = self._events("personalised")
        return {
            "heldout_loss": last["loss"],
            "heldout_loss_worst_site": last["worst_loss"],
            "heldout_loss_global": own["federated"],
            "heldout_loss_personalised": own["loss"],
            "base_loss": evaluations[0]["loss"],
            "bytes_up": sum(event["bytes_up"] for event in rounds),
            "bytes_down": sum(event["bytes_down"] for event in rounds + evaluations),
            "server_s": sum(event["phases"].get(name, 0.0) for event in rounds for name in SERVER_PHASES),
            "server_peak_rss_bytes": self.server_peak_rss_bytes,
            "exactness_error": exactness_error(self.sites, last["round"]),
            "sites": {site: score["loss"] for site, score in last["sites"].items()},
        }

    def _events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]


SERVER_PHASES = ("select", "broadcast", "aggregate")
"""Phases of a round in which the server works and does not wait for sites."""


def federate(config: RunConfig, num_sites: int) -> Federated:
    """Run one federation to its end.

    Raises:
        RuntimeError: It did not finish; what the server said is in the message.
    """
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1  # Flower's messages cannot do without
    sites = observed_sites(num_sites, rounds={config.num_rounds})
    with tempfile.TemporaryDirectory() as home:
        settings: dict[str, Scalar] = {**flat(config), "name": "benchmark", "home": home}
        peak = _served(settings, sites, Path(home) / "server.log")
        events = read_metrics(Path(home) / "runs" / "benchmark" / "metrics.jsonl")
    failures = [failure for site in sites.values() for failure in site.failures]
    if failures:
        raise RuntimeError(f"a site could not do its part: {failures[0]}")
    return Federated(events, list(sites.values()), peak)


def _served(settings: Mapping[str, Scalar], sites: Mapping[int, ObservedSite], log: Path) -> int:
    """Let the sites answer a server until it ends; return its peak memory."""
    line, theirs = Pipe()
    command = [sys.executable, "-m", "benchmarks.strategies.server", str(theirs.fileno())]
    with log.open("wb") as output, line:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, pass_fds=[theirs.fileno()], stdout=output, stderr=subprocess.STDOUT
        )
        theirs.close()
        try:
            peak = _answered(line, settings, sites)
            process.wait(ENDING_S)
            return peak
        except EOFError:
            process.wait(ENDING_S)
            raise RuntimeError(f"the server ended early:\n{log.read_text()}") from None
        finally:
            process.kill()
            process.wait()


def _answered(line: Connection, settings: Mapping[str, Scalar], sites: Mapping[int, ObservedSite]) -> int:
    line.send((settings, list(sites)))
    while not isinstance(asked := line.recv(), int):
        node, message = asked
        line.send(sites[node](message))
    return asked
