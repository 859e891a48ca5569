"""The service of a site: keeps Flower's SuperNode and SuperExec running for as long as it is not told to stop.

The SuperExec starts a process for every message of the server. It is a program of its own with a secret shared with the
SuperNode, so that nobody else on the machine can take the site's work. Once the server has let the site in, a third program
keeps the libraries loaded that messages need (:mod:`client_app.service.warm`). Whichever of them ends is started again;
with the SuperNode the others are too, because the work that they hold is lost with the SuperNode's memory.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import signal
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from client_app.doctor.case import Case
from client_app.doctor.certificates import NEW_KIT, broken_certificates
from client_app.observability.show import shown
from client_app.service.backoff import Backoff
from client_app.service.child import Child, Companion
from client_app.service.flower import (
    HEARTBEAT_LAPSE_S,
    NOT_ADMITTED,
    Event,
    environment,
    read_line,
    superexec_command,
    supernode_command,
    with_warm_clientapps,
    without_colors,
    write_node_config,
)
from client_app.service.folder import ServiceFolder
from client_app.service.log import service_log
from client_app.service.status import Status, now, write_status
from client_app.service.warm import SOCKET, warm_command
from client_app.site import load_site_config
from fedllm.files import atomic_write
from fedllm.logs import FORMAT_VARIABLE, LogFormat, wants_json
from fedllm.provision.kit import SITE, Kit, read_kit

GRACE_S = 15.0
TICK_S = 0.2


def run_service(path: Path, *, echo: bool = True) -> None:
    """Serve a site until SIGTERM or SIGINT; must be called in the main thread.

    Args:
        path: Folder of the site's kit.
        echo: Write the log to standard error too.

    Raises:
        ConfigError: It is no kit, the data owner's file is wrong, or the site is already served.
    """
    folder = ServiceFolder(path.absolute())
    kit = read_kit(folder.kit)
    owner = load_site_config(folder.kit / SITE)  # a wrong file should be known now and not in the first round
    os.umask(0o077)
    with folder.held():
        _prepare(folder, kit)
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        as_json = wants_json(owner.observability.log_format)
        log = service_log(folder, kit.site, echo=echo, as_json=as_json)
        for problem in broken_certificates(Case(owner)):
            log.warning("[service] %s. %s", problem, NEW_KIT)
        with shown(folder, owner, log):
            Service(folder, kit, stop, log, log_format="json" if as_json else "text").run()


def _prepare(folder: ServiceFolder, kit: Kit) -> None:
    if not folder.secret.exists():
        atomic_write(folder.secret, secrets.token_bytes(32), mode=0o600)
    write_node_config(folder, kit)


class Service:
    """One run of the service; its state is the status that it writes."""

    def __init__(
        self,
        folder: ServiceFolder,
        kit: Kit,
        stop: threading.Event,
        log: logging.Logger,
        *,
        log_format: LogFormat = "text",
    ) -> None:
        self._folder = folder
        self._kit = kit
        self._stop = stop
        self._environment = environment(folder, {**os.environ, FORMAT_VARIABLE: log_format})
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._log = log
        self._status = Status(phase="starting", pid=os.getpid(), started=now())
        self._refused_since: float | None = None
        self._refusal = ""

    def run(self) -> None:
        """Start the SuperNode again and again."""
        backoff = Backoff()
        write_status(self._folder.status, self._status)
        self._log.info("[service] begins for site %s, server %s", self._kit.site, self._kit.server)
        while not self._stop.is_set():
            began = time.monotonic()
            self._live()
            if self._stop.is_set():
                break
            lapses = self._lapses()
            wait_s = backoff.next_wait_s(life_s=time.monotonic() - began, lapses=lapses)
            self._report(phase="waiting", note=self._why(lapses), num_restarts=self._status.num_restarts + 1)
            self._log.info("[service] SuperNode ended (%s); next start in %.0f s", self._status.note, wait_s)
            self._stop.wait(wait_s)
        self._log.info("[service] ends")

    def _live(self) -> None:
        """Run SuperNode and SuperExec until the SuperNode ends or the service stops."""
        port = _free_port()
        is_warm = self._folder.path / SOCKET
        is_warm.unlink(missing_ok=True)
        self._refusal = ""
        self._report(phase="starting")
        node = Child(supernode_command(self._folder, self._kit, port), self._environment, self._hear)
        superexec = self._companion(
            "SuperExec",
            superexec_command(self._folder, port, os.getpid()),
            with_warm_clientapps(self._environment, self._folder),
        )
        warm = self._companion("warm process", warm_command(self._folder.path), self._environment)
        try:
            while not self._stop.is_set() and not node.has_ended:
                if self._status.phase == "connected":
                    warm.tend()
                if is_warm.exists() or warm.num_ends:  # Flower takes work back that is not begun within 30 s
                    superexec.tend()
                self._take_events()
        finally:
            for child in (superexec, warm, node):
                child.end(GRACE_S)
            self._take_events()

    def _companion(self, name: str, command: list[str], environment: Mapping[str, str]) -> Companion:
        def said() -> None:
            self._log.info("[service] %s ended; it is started again", name)

        return Companion(lambda: Child(command, environment, self._write), said)

    def _hear(self, line: str) -> None:
        self._write(line)
        if event := read_line(line):
            self._events.put(event)

    def _write(self, line: str) -> None:
        if text := without_colors(line):
            self._log.info("%s", text)

    def _take_events(self) -> None:
        try:
            self._handle(self._events.get(timeout=TICK_S))
            while True:
                self._handle(self._events.get_nowait())
        except queue.Empty:
            return

    def _handle(self, event: Event) -> None:
        if event.kind == "connected":
            self._refused_since = None
            self._report(phase="connected", note="", node_id=event.detail or self._status.node_id)
        elif event.kind == "message":
            self._report(phase="connected", note="", last_message=event.detail, last_message_at=now())
        elif event.kind == "unreachable":
            self._report(phase="unreachable")
        elif event.kind == "refused":
            self._refusal = event.detail
        elif not self._refusal:
            self._refusal = f"Flower's exit code {event.detail}, see {self._folder.log}"

    def _lapses(self) -> bool:
        """Say whether an old connection may explain the refusal, and remember since when it has been refused."""
        if self._refusal != NOT_ADMITTED:
            self._refused_since = None
            return False
        self._refused_since = self._refused_since or time.monotonic()
        return time.monotonic() - self._refused_since < 1.5 * HEARTBEAT_LAPSE_S

    def _why(self, lapses: bool) -> str:
        if lapses:
            return (
                f"not admitted yet: after a crash the server keeps the old connection for up to {HEARTBEAT_LAPSE_S:.0f} s; "
                "a new site must be registered by the operator"
            )
        if self._refusal == NOT_ADMITTED:
            return "not admitted: ask the operator whether this site is registered, and whether it runs elsewhere"
        return self._refusal or "the SuperNode ended"

    def _report(self, **changes: object) -> None:
        changed = self._status.model_copy(update=changes)
        if changed != self._status:
            write_status(self._folder.status, changed)
        self._status = changed


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port
