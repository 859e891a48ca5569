"""The endpoint of a running ServerApp.

A ServerApp lives as long as its run and is asked at the address of the run config. After the run's end it waits for one
more request, so that Prometheus, which asks every few seconds, sees the last round and how the run ended.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager

from fedllm.config import ObservabilityConfig
from fedllm.observability.address import Address
from fedllm.observability.endpoint import Endpoint
from server_app.observability.figures import RunFigures

log = logging.getLogger(__name__)

VARIABLE = "FEDLLM_METRICS"
"""Environment variable that says where to listen, where the run config does not."""


@contextmanager
def shown(figures: RunFigures, run: str, section: ObservabilityConfig) -> Iterator[None]:
    """Show a run's figures while it lives, if there is an address to show them at.

    Figures never keep a run from running: where no port is free the run goes on without them.

    Args:
        figures: Of the run.
        run: Its name.
        section: Where, and how long after the end.

    Raises:
        ConfigError: The address cannot be read.
    """
    where = section.metrics or os.environ.get(VARIABLE, "")
    address = Address.parse(where) if where else None
    endpoint = _listen(address, figures, run) if address else None
    if endpoint is None:
        yield
        return
    with closing(endpoint):
        try:
            yield
        except Exception:
            endpoint.wait_for_request(section.linger_s)
            raise
        endpoint.wait_for_request(section.linger_s)


def _listen(address: Address, figures: RunFigures, run: str) -> Endpoint | None:
    try:
        endpoint = Endpoint(address, figures.board, {"run": run})
    except OSError as error:
        ports = f"{address.ports.start}-{address.ports.stop - 1}"
        log.warning("no metrics for Prometheus: cannot listen on %s, ports %s: %s", address.host, ports, error)
        return None
    log.info("metrics for Prometheus at %s", endpoint.url)
    return endpoint
