"""The server's end of the transport that the run config names."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from fedllm.config import RunConfig, TransportConfig
from fedllm.errors import ConfigError, explain
from fedllm.runs import RunFolder
from fedllm.wire.inline import InlineServerTransport
from fedllm.wire.server import UpdateServer
from fedllm.wire.spool import Spool
from fedllm.wire.stream import StreamServerTransport
from fedllm.wire.ticket import TicketKey
from fedllm.wire.tls import TlsConfig
from fedllm.wire.transport import ServerTransport

log = logging.getLogger(__name__)

SPOOL = "spool"
"""Folder within a run's folder for payloads under way; emptied when the server starts and ends."""

_LOOPBACK = ("127.0.0.1", "localhost", "::1")

Build = Callable[[RunConfig, RunFolder, Path, bool], ServerTransport]


def build_transport(config: RunConfig, folder: RunFolder, *, is_simulation: bool) -> ServerTransport:
    """Build the server's end of the transport, listening where it has to.

    Args:
        config: The effective run config.
        folder: The run's folder.
        is_simulation: All sites run on this machine.

    Raises:
        ConfigError: The stream would go unencrypted and nobody said that it may, or a file or port is wrong.
    """
    spool = folder.path / SPOOL
    shutil.rmtree(spool, ignore_errors=True)
    return TRANSPORTS[config.transport.kind](config, folder, spool, is_simulation)


def _inline(config: RunConfig, folder: RunFolder, spool: Path, is_simulation: bool) -> ServerTransport:  # noqa: ARG001
    return InlineServerTransport(spool)


def _stream(config: RunConfig, folder: RunFolder, spool: Path, is_simulation: bool) -> ServerTransport:
    section = config.transport
    store = Spool(spool)
    server = UpdateServer(
        store,
        TicketKey.generate(),
        folder.name,
        bind=section.bind,
        ports=section.ports,
        tls=_tls(section),
        insecure=_is_plaintext(section, is_simulation),
    )
    log.info("updates stream to %s (%s)", section.advertise or server.address, _security(section))
    return StreamServerTransport(server, store, lifetime_s=config.rounds.deadline_s, advertise=section.advertise)


def _tls(section: TransportConfig) -> TlsConfig | None:
    if not section.tls_certificate:
        return None
    ca = Path(section.tls_client_ca) if section.tls_client_ca else None
    return TlsConfig(ca, Path(section.tls_certificate), Path(section.tls_key))


def _is_plaintext(section: TransportConfig, is_simulation: bool) -> bool:
    """Tell whether the stream goes unencrypted: said explicitly, or within this machine in simulation."""
    if section.tls_certificate:
        return False
    if section.insecure or (is_simulation and section.bind in _LOOPBACK):
        return True
    fix = "Name transport.tls_certificate and transport.tls_key, or set transport.insecure=true for a closed network."
    raise ConfigError(explain("the update stream has no certificate", where="transport", fix=fix))


def _security(section: TransportConfig) -> str:
    if section.tls_certificate:
        return "TLS"
    return "unencrypted as far as the gateway there" if section.advertise else "unencrypted"


TRANSPORTS: dict[str, Build] = {"grpc": _stream, "flower": _inline}
