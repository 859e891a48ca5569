"""A site's end of the transport that an instruction names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from client_app.audit.notes import Notes
from client_app.site import SiteConfig
from fedllm.errors import TransportError, explain
from fedllm.messages import Instruction
from fedllm.wire.client import UpdateClient
from fedllm.wire.inline import InlineClientTransport
from fedllm.wire.stream import StreamClientTransport
from fedllm.wire.tls import TlsConfig
from fedllm.wire.transport import ClientTransport, Envelope

Build = Callable[[SiteConfig | None], ClientTransport]


def build_transport(envelope: Envelope, owner: SiteConfig | None) -> ClientTransport:
    """Build the site's end of the transport.

    Args:
        envelope: What the server's transport put into the instruction.
        owner: The data owner's file, None in simulation, where the stream stays within the machine.

    Raises:
        TransportError: The transport is unknown here.
        ConfigError: The data owner's file does not allow it as it is.
    """
    kind = envelope.get("transport", str)
    if kind not in TRANSPORTS:
        raise TransportError(explain("an unknown transport", expected=f"one of {sorted(TRANSPORTS)}", found=kind))
    return TRANSPORTS[kind](owner)


def hand_over(instruction: Instruction, envelope: Envelope, owner: SiteConfig | None, payload: Path) -> Envelope:
    """Deliver a payload to the server and return what goes into the reply; the site's audit log has it before it leaves."""
    if owner:
        Notes(owner, instruction).sending(envelope, payload)
    return build_transport(envelope, owner).push(envelope, payload)


def _inline(owner: SiteConfig | None) -> ClientTransport:  # noqa: ARG001
    return InlineClientTransport()


def _stream(owner: SiteConfig | None) -> ClientTransport:
    if owner is None:
        return StreamClientTransport(partial(UpdateClient, insecure=True))
    section = owner.transport
    tls = None if section.insecure else TlsConfig(section.ca, section.certificate, section.key)
    return StreamClientTransport(partial(UpdateClient, tls=tls, insecure=section.insecure), section.address)


TRANSPORTS: dict[str, Build] = {"grpc": _stream, "flower": _inline}
