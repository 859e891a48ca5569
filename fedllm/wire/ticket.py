"""Tickets: who may move which bytes, once.

A ticket is issued by the server, travels to one site inside Flower's authenticated message, and comes back on the update
stream, which knows its callers by nothing else. It authorizes one fetch or one push::

    fedllm-ticket-v1.<claims>.<mac>

``claims`` is base64url of a JSON object with exactly the fields of :class:`Ticket`; ``mac`` is HMAC-SHA256 over all that
stands before it, in hexadecimal. The code is checked before anything is parsed, over the very characters that arrived, so
no two readings of one ticket exist. New fields need a new version in the prefix.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
import time
from dataclasses import asdict, dataclass, field, fields
from typing import Literal

from fedllm.errors import TicketError, explain

Direction = Literal["fetch", "push"]

PREFIX = "fedllm-ticket-v1"
MAX_TICKET_CHARS = 4096
KEY_BYTES = 32


@dataclass(frozen=True)
class Ticket:
    """What a ticket claims.

    Attributes:
        run: The run that it belongs to.
        round_: The round.
        attempt: Which opening of the round; a round that is opened again voids earlier tickets.
        site: The site's stable name.
        direction: ``fetch`` (server to site) or ``push`` (site to server).
        max_bytes: The most bytes of payload that it may move.
        expires_at: Seconds since the epoch, by the server's clock, after which it is refused.
        state_id: The published state that a fetch may read, empty for a push.
        id: Random, so that no two tickets are alike.
    """

    run: str
    round_: int
    attempt: int
    site: str
    direction: Direction
    max_bytes: int
    expires_at: int
    state_id: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(16))

    def __str__(self) -> str:
        return f"ticket {self.id[:8]} of {self.site!r} to {self.direction} in round {self.round_}"


class TicketKey:
    """Issues and verifies the tickets of one run.

    Args:
        secret: 32 random bytes, new for every run and kept by the server alone.
    """

    def __init__(self, secret: bytes) -> None:
        assert len(secret) == KEY_BYTES, "a ticket key has 32 bytes"
        self._secret = secret

    @classmethod
    def generate(cls) -> TicketKey:
        """Make a key from the operating system's generator."""
        return cls(secrets.token_bytes(KEY_BYTES))

    def issue(self, ticket: Ticket) -> str:
        """Return a ticket's text."""
        claims = json.dumps(asdict(ticket), separators=(",", ":"), sort_keys=True)
        body = f"{PREFIX}.{base64.urlsafe_b64encode(claims.encode()).decode()}"
        text = f"{body}.{self._code(body)}"
        assert len(text) <= MAX_TICKET_CHARS, "a ticket's names are too long"
        return text

    def verify(self, text: str, *, run: str, direction: Direction, now: float | None = None) -> Ticket:
        """Return what a genuine ticket claims.

        Args:
            text: What a peer presented.
            run: The run that is asked for.
            direction: What the peer wants to do.
            now: Seconds since the epoch; the system's clock if None.

        Raises:
            TicketError: It is not ours, has expired, or was made for another run or direction.
        """
        body, _, code = text[:MAX_TICKET_CHARS].rpartition(".")
        if not hmac.compare_digest(code.encode(), self._code(body).encode()):
            raise TicketError(explain("a ticket was not issued by this server for this run, or was changed"))
        ticket = _parse(body)
        if ticket.run != run:
            raise TicketError(explain("a ticket belongs to another run", expected=run, found=ticket.run))
        if ticket.direction != direction:
            raise TicketError(explain("a ticket serves the other direction", expected=direction, found=ticket))
        if (time.time() if now is None else now) >= ticket.expires_at:
            raise TicketError(explain(f"{ticket} has expired", fix="Allow more time per round."))
        return ticket

    def _code(self, body: str) -> str:
        return hmac.new(self._secret, body.encode(), hashlib.sha256).hexdigest()


def _parse(body: str) -> Ticket:
    """Read claims whose code was right; what fails here was issued by another release with the same key."""
    prefix, _, claims = body.partition(".")
    try:
        values = json.loads(base64.urlsafe_b64decode(claims))
    except (binascii.Error, ValueError) as error:
        raise TicketError(explain("a ticket cannot be read", found=error)) from error
    names = {item.name for item in fields(Ticket)}
    if prefix != PREFIX or not isinstance(values, dict) or set(values) != names:
        raise TicketError(explain("a ticket has another version", expected=PREFIX, found=prefix))
    return Ticket(**values)
