"""Flower's entry point on the server: it waits until the simulation is up, and only then loads the ServerApp.

In simulation Flower runs the ServerApp in a thread while it starts Ray in another. Ray starts its programs by a fork that
runs Python code before the exec (flwr 1.41, Ray 2.55), and a thread that loads libraries or runs gRPC at that moment can
leave the child with a lock that nobody holds any more: the program never starts, Ray gives up after 30 seconds, and the
run ends with Flower's exit code 700. So nothing is loaded here but Flower until Ray is up. This can go when Ray starts its
programs without Python code in between.
"""

from __future__ import annotations

import sys
import time

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

MAX_WAIT_S = 120.0
POLL_S = 0.05

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume one federation."""
    fixed_sites = is_simulation(grid)
    if fixed_sites:
        _wait_for_ray()
    from server_app.app import serve

    serve(grid, context, fixed_sites=fixed_sites)


def is_simulation(grid: Grid) -> bool:
    """Tell whether Flower simulates the sites; flwr 1.41 has no public way to ask."""
    return type(grid).__name__ == "InMemoryGrid"


def _wait_for_ray() -> None:
    """Return when Ray is up, or after a while without it, since Flower then has ended the run or uses something else."""
    end = time.monotonic() + MAX_WAIT_S
    while time.monotonic() < end:
        ray = sys.modules.get("ray")
        if getattr(ray, "is_initialized", bool)():
            return
        time.sleep(POLL_S)
