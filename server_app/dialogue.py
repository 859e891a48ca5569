"""Asking sites to do something with a state, and asking again where that can help.

A reply can be lost after the work was done (flwr 1.41 drops a whole reply when one response to it is lost), and a site can
lack a state that it held before it was moved or wiped. Both are asked again within the round, once they are back if they
went away; a site keeps its finished update, so it does not train twice for one request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

from fedllm.errors import StaleStateError
from fedllm.messages import Failure, StateInstruction
from fedllm.wire.transport import Envelope
from server_app.broadcast import Start
from server_app.exchange import Deadline, Reply
from server_app.federation import Federation
from server_app.roster import Member

log = logging.getLogger(__name__)

Make = Callable[[str, Mapping[str, object]], StateInstruction]
"""Builds a site's instruction from its name and the fields that are the same for all kinds."""

_WORTH_ASKING_AGAIN = (StaleStateError.__name__, "FlowerError")


class Dialogue:
    """One question to several sites about a state, within an open round.

    Args:
        federation: What the phases share.
        starts: The state to send, by site.
        round_: The transport's round.
        make: Builds a site's instruction.
        with_update: Whether an update may come back.

    Attributes:
        bytes_down: Payload bytes offered so far.
    """

    def __init__(
        self,
        federation: Federation,
        starts: Mapping[str, Start],
        round_: int,
        make: Make,
        *,
        with_update: bool,
    ) -> None:
        self._federation, self._starts = federation, starts
        self._round, self._make, self._with_update = round_, make, with_update
        self._resends: dict[str, int] = {}
        self._asked: dict[int, tuple[str, Member]] = {}
        self._group = f"round-{round_}"
        self.bytes_down = 0

    def ask(self, sites: Mapping[str, Member], deadline: Deadline) -> Iterator[tuple[str, Reply]]:
        """Send to all and yield each site's answer as it comes; a site that stays silent yields nothing."""
        pending = self.send(sites)
        for reply in self._federation.exchange.replies(pending, deadline):
            if (site := self.settle(reply, pending)) is not None:
                yield site, reply

    def send(self, sites: Mapping[str, Member]) -> dict[str, int]:
        """Send to all and return each node by message id."""
        self._asked |= {member.node: (name, member) for name, member in sites.items()}
        messages = {member.node: self._message(name) for name, member in sites.items()}
        return self._federation.exchange.send(messages, self._group)

    def settle(self, reply: Reply, pending: dict[str, int]) -> str | None:
        """Return whose answer a reply is, or None where the site was asked again, which is then in `pending`."""
        site, member = self._asked[reply.node]
        if self._is_worth_asking_again(site, reply):
            instruction, envelope = self._message(site)
            pending |= self._federation.exchange.send_when_back(member.node, instruction, envelope, self._group)
            return None
        if not isinstance(reply.message, Failure):
            self._federation.broadcaster.confirm(site, self._starts[site].broadcast.state_id)
        return site

    def _message(self, site: str) -> tuple[StateInstruction, Envelope]:
        federation, transport = self._federation, self._federation.config.transport
        state, broadcast = self._starts[site].state, self._starts[site].broadcast
        parcel = federation.broadcaster.parcel(site, broadcast, state)
        common = {
            **federation.instruction,
            "state_id": broadcast.state_id,
            "delivery": parcel.delivery,
            "reference_id": parcel.reference_id,
            "tensors": parcel.package.tensors if parcel.package else (),
            "layout": state.layout.digest,
            "base": state.agreement.base,
        }
        envelope = federation.transport.offer(
            round_=self._round,
            site=site,
            state_id=parcel.package.name if parcel.package else None,
            max_update_bytes=transport.max_update_bytes if self._with_update else 0,
        )
        self.bytes_down += parcel.package.num_bytes if parcel.package else 0
        return self._make(site, common), envelope

    def _is_worth_asking_again(self, site: str, reply: Reply) -> bool:
        message = reply.message
        if not isinstance(message, Failure) or message.error not in _WORTH_ASKING_AGAIN:
            return False
        self._federation.broadcaster.forget(site)
        count = self._resends[site] = self._resends.get(site, 0) + 1
        if count > self._federation.config.rounds.resends:
            return False
        log.info("asking %s again: %s", site, message.reason)
        return True
