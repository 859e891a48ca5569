"""Shows a site's figures: those of the work, from the file that the ClientApp keeps, and those of the service."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from client_app.observability.families import LOSSES, SERVICE, WORK
from client_app.observability.tally import read_board
from client_app.service.folder import ServiceFolder
from client_app.service.status import Status, read_status
from client_app.site import SiteConfig, load_site_config
from fedllm.errors import ConfigError
from fedllm.observability.board import Board
from fedllm.observability.endpoint import Endpoint
from fedllm.provenance import versions
from fedllm.provision.kit import SITE

log = logging.getLogger(__name__)


def site_board(owner: SiteConfig, status: Status | None = None) -> Board:
    """Return a site's figures as they are now.

    Args:
        owner: The data owner's file.
        status: What its service says about itself, None where none runs.
    """
    board = Board((*WORK, *LOSSES, *SERVICE), read_board(owner).figures())
    board.set("fedllm_site_info", 1, version=versions()["fedllm"])
    board.set("fedllm_site_connected", bool(status and status.phase == "connected"))
    if status is not None:
        board.add("fedllm_site_restarts_total", status.num_restarts)
        times = {"started": status.started, "last_message": status.last_message_at}
        for name, moment in times.items():
            if moment:
                seconds = datetime.fromisoformat(moment).timestamp()
                board.set(f"fedllm_site_{name}_timestamp_seconds", seconds)
    return board


@contextmanager
def shown(folder: ServiceFolder, owner: SiteConfig, service_log: logging.Logger) -> Iterator[None]:
    """Show a site's figures while its service runs, if the data owner names an address.

    The data owner's file is read anew for every request, as it is for every message. Where no port is free the service goes
    on without figures.
    """
    address = owner.observability.address
    if address is None:
        yield
        return
    try:
        endpoint = Endpoint(address, lambda: _board(folder.kit / SITE, folder.status, owner), {"site": owner.site.name})
    except OSError as error:
        service_log.warning("[service] no metrics: cannot listen on %s: %s", owner.observability.metrics, error)
        yield
        return
    service_log.info("[service] metrics for Prometheus at %s", endpoint.url)
    try:
        yield
    finally:
        endpoint.close()


def _board(file: Path, status: Path, before: SiteConfig) -> Board:
    try:
        owner = load_site_config(file)
    except ConfigError:  # it is being edited; until it is right, no loss is shown
        owner = before.model_copy(update={"sharing": before.sharing.model_copy(update={"losses": False})})
    return site_board(owner, read_status(status))
