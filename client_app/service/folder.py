"""Where a site's service keeps its files, and the lock that says that it runs.

Everything lies in ``service/`` of the site's kit::

    service/lock             held by the running service, which writes its process id into it
    service/status.json      what it says about itself
    service/superexec.secret what lets the site's own SuperExec, and nobody else on this machine, take work
    service/node.toml        what the SuperNode tells the ClientApp: where the site's file is
    service/bin, service/warm  where messages find loaded libraries (:mod:`client_app.service.warm`)
    service/log              output of all processes, rotated
    service/beginning        what the service said before it had its log
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedllm.errors import ConfigError, explain


@dataclass(frozen=True)
class ServiceFolder:
    """The files of one site's service.

    Attributes:
        kit: Folder of the site's kit.
    """

    kit: Path

    @property
    def path(self) -> Path:
        """Return the folder itself."""
        return self.kit / "service"

    @property
    def lock(self) -> Path:
        """Return the file that a running service holds."""
        return self.path / "lock"

    @property
    def status(self) -> Path:
        """Return the status file."""
        return self.path / "status.json"

    @property
    def secret(self) -> Path:
        """Return the secret between SuperNode and SuperExec."""
        return self.path / "superexec.secret"

    @property
    def node_config(self) -> Path:
        """Return the SuperNode's node config."""
        return self.path / "node.toml"

    @property
    def log(self) -> Path:
        """Return the log of all processes."""
        return self.path / "log"

    @property
    def beginning(self) -> Path:
        """Return the first output of a service in the background."""
        return self.path / "beginning"

    def make(self) -> None:
        """Make the folder, for its owner alone."""
        self.path.mkdir(mode=0o700, exist_ok=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock while the service runs.

        Raises:
            ConfigError: Another service of this kit runs.
        """
        self.make()
        descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not _took(descriptor, within_s=1.0):  # one who only looks holds it for a moment
                fix = "See `fedllm site status`; end it with `fedllm site stop`."
                raise ConfigError(explain("this site is already served", where=self.kit, fix=fix))
            os.truncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            yield
            os.truncate(descriptor, 0)
        finally:
            os.close(descriptor)

    def holder(self) -> int | None:
        """Return the process id of the running service, None where none runs; 0 for one that has not yet said its id."""
        try:
            descriptor = os.open(self.lock, os.O_RDWR)
        except FileNotFoundError:
            return None
        try:
            return None if _took(descriptor) else int(os.read(descriptor, 32).strip() or 0)
        finally:
            os.close(descriptor)


def _took(descriptor: int, within_s: float = 0.0) -> bool:
    end = time.monotonic() + within_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)
        else:
            return True
