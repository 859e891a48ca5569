"""Start a site's service in the background, look at it, or end it, from another process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from client_app.service.folder import ServiceFolder
from client_app.service.status import Status, read_status
from client_app.site import load_site_config
from fedllm.errors import ConfigError, TransportError, explain
from fedllm.provision.kit import SITE, read_kit

START_S = 60.0
CONNECT_S = 30.0
STOP_S = 40.0


def start_site(kit: Path, *, connect_s: float = CONNECT_S) -> Status:
    """Start the service of a kit in the background and return its status once it is connected.

    Args:
        kit: Folder of the site's kit.
        connect_s: How long to wait for the connection; the service goes on trying afterwards.

    Raises:
        ConfigError: It is no kit, the data owner's file is wrong, or the site is already served.
        TransportError: The service did not begin.
    """
    folder = _folder(kit)
    read_kit(folder.kit)
    load_site_config(folder.kit / SITE)
    if folder.holder() is not None:
        fix = "See `fedllm site status`; end it with `fedllm site stop`."
        raise ConfigError(explain("this site is already served", where=kit, fix=fix))
    folder.make()
    folder.status.unlink(missing_ok=True)
    process = _in_background(folder)
    _wait_until(lambda: folder.status.exists() or process.poll() is not None, START_S)
    if process.poll() is not None or not folder.status.exists():
        found = folder.beginning.read_text(errors="replace").strip().splitlines()[-1:]
        raise TransportError(
            explain("the service did not begin", found=" ".join(found) or None, where=folder.beginning)
        )
    _wait_until(lambda: read_status(folder.status).phase != "starting" or process.poll() is not None, connect_s)
    return site_status(kit)


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


def _in_background(folder: ServiceFolder) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fedllm.cli", "site", "start", "--foreground", "--quiet", str(folder.kit)]
    opened = os.open(folder.beginning, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=opened, stderr=subprocess.STDOUT, start_new_session=True
        )
    finally:
        os.close(opened)
    threading.Thread(target=process.wait, daemon=True).start()  # reaps it where the caller lives longer
    return process


def _wait_until(is_so: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not is_so() and time.monotonic() < end:
        time.sleep(0.1)


def _folder(kit: Path) -> ServiceFolder:
    if not kit.is_dir():
        raise ConfigError(explain("there is no such folder", where=kit, fix="Name the folder of the site's kit."))
    return ServiceFolder(kit.absolute())
