"""The client's transport, as the server's instruction names it."""

from __future__ import annotations

from collections.abc import Callable

from fedllm.errors import TransportError, explain
from fedllm.wire import inline, stream
from fedllm.wire.client import UpdateClient
from fedllm.wire.transport import ClientTransport, Envelope


def client_transport(instruction: Envelope, connect: Callable[..., UpdateClient], address: str = "") -> ClientTransport:
    """Return the transport that an instruction asks for.

    Args:
        instruction: What the server sent.
        connect: Makes a client of the update stream (see :class:`fedllm.wire.stream.StreamClientTransport`).
        address: What the site's admin has set to connect to; empty takes the instruction's.

    Raises:
        TransportError: The instruction names a transport that this release does not know.
    """
    kind = instruction.get("transport", str)
    if kind == inline.KIND:
        return inline.InlineClientTransport()
    if kind == stream.KIND:
        return stream.StreamClientTransport(connect, address)
    known = f"{inline.KIND!r} or {stream.KIND!r}"
    raise TransportError(explain("the server uses an unknown transport", expected=known, found=repr(kind)))
