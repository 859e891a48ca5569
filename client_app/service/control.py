"""Look at a site's service, or end it, from another process."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from client_app.service.folder import ServiceFolder
from client_app.service.status import Status, read_status
from fedllm.errors import ConfigError, TransportError, explain

STOP_S = 40.0


def site_status(kit: Path) -> Status:
    """Return what the service of a kit says about itself.

    Raises:
        ConfigError: There is no such folder.
    """
    folder = _folder(kit)
    holder = folder.holder()
    return Status() if holder is None else read_status(folder.status).model_copy(update={"pid": holder})


def stop_site(kit: Path, *, timeout_s: float = STOP_S) -> bool:
    """End the service of a kit and wait for its end; False where none ran.

    Raises:
        ConfigError: There is no such folder.
        TransportError: It still runs after the timeout.
    """
    folder = _folder(kit)
    end = time.monotonic() + timeout_s
    asked = False
    while (holder := folder.holder()) is not None:
        if holder and not asked:
            asked = True
            with suppress(ProcessLookupError):
                os.kill(holder, signal.SIGTERM)
        if time.monotonic() > end:
            fix = f"Look at {folder.log}; `kill -9 {holder}` ends it by force."
            raise TransportError(explain(f"the service did not end within {timeout_s:.0f} s", where=kit, fix=fix))
        time.sleep(0.1)
    return asked


def _folder(kit: Path) -> ServiceFolder:
    if not kit.is_dir():
        raise ConfigError(explain("there is no such folder", where=kit, fix="Name the folder of the site's kit."))
    return ServiceFolder(kit.absolute())
