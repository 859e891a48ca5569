"""Rounds of Flower's own transport between real processes: a SuperLink, SuperNodes, a ServerApp, ClientApps."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.flower_deployment import deployment

APP = Path(__file__).with_name("flower-app")


def flower_rounds(megabytes: int, num_arrays: int, num_clients: int, num_rounds: int) -> list[float]:
    """Return the seconds of each round, the first of a warm-up left out.

    Args:
        megabytes: float32 bytes that travel each way to and from each client, in MB.
        num_arrays: In how many arrays; 0 sends next to nothing, which shows what a round costs in itself.
        num_clients: SuperNodes.
        num_rounds: Rounds to count.
    """
    with tempfile.TemporaryDirectory() as name:
        result = Path(name) / "seconds.json"
        shape = f"megabytes={megabytes} arrays={num_arrays} clients={num_clients}"
        with deployment(Path(name), [""] * num_clients) as federation:
            output = federation.start(APP, f'{shape} rounds={num_rounds + 1} output="{result}"').communicate()[0]
        if not result.exists():
            raise RuntimeError(f"the Flower app did not finish:\n{output}")
        return [float(seconds) for seconds in json.loads(result.read_text())[1:]]
