"""Who has joined: sites by name, what they hold, and who was left out and why."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from fedllm.agreement import Agreement, check_agreement, common_ground
from fedllm.errors import AgreementError, ConfigError, LayoutError, QuorumError, explain
from fedllm.lora.choice import rank_at
from fedllm.messages import Failure, Hello, Introduction
from fedllm.update import Layout
from server_app.exchange import Exchange, Reply

GRACE_S = 60.0
"""Seconds to wait for slower sites once enough have joined."""

AGAIN_S = 5.0
"""Fewest seconds until a node is greeted again: one that a greeting did not reach, or whose ClientApp died of it, and one
that says when it can take part. A SuperNode that was started anew counts as absent until its old heartbeat has run out, up
to a minute."""


@dataclass(frozen=True)
class Member:
    """A site that agrees and takes part."""

    node: int
    introduction: Introduction


class Roster:
    """Sites by name. A site that joins later is asked the same questions as the first ones, and one that cannot take part
    for now is asked again when it said that it can.

    Args:
        exchange: The way to the sites.
        hello: What every site is asked.
        on_left_out: Called with the site's name and the reason when one is left out.
        fixed_sites: No further sites will come up, as in simulation, so waiting for them is pointless.
        agreement: What the federation holds, where a run is resumed; None takes what most sites state.
    """

    def __init__(
        self,
        exchange: Exchange,
        hello: Hello,
        on_left_out: Callable[[str, str], None],
        *,
        fixed_sites: bool,
        agreement: Agreement | None = None,
    ) -> None:
        self._exchange = exchange
        self._hello, self._config = hello, hello.read_config()
        self._on_left_out = on_left_out
        self._pending: dict[str, int] = {}
        self._asked: set[int] = set()
        self._resting_until: dict[int, float] = {}
        self._waiting: dict[int, Introduction] = {}
        self._reasons: dict[str, str] = {}
        self._fixed_sites = fixed_sites
        self.members: dict[str, Member] = {}
        self.agreement = agreement

    def gather(self, min_sites: int, timeout_s: float) -> None:
        """Wait until enough sites have joined and agree.

        Raises:
            QuorumError: Too few joined in time, or in simulation at all; every refused site's reason is in the message.
        """
        start = time.monotonic()
        while True:
            self._poll()
            elapsed, answered = time.monotonic() - start, not self._pending and bool(self._asked)
            enough = len(self._waiting) >= min_sites
            if enough and (answered or (elapsed >= GRACE_S and not self._fixed_sites)):
                break
            if elapsed >= timeout_s or (answered and self._fixed_sites):
                break
            time.sleep(0.25)
        self._settle()
        if len(self.members) < min_sites:
            raise QuorumError(self._too_few(min_sites, time.monotonic() - start))

    def admit(self) -> None:
        """Take in sites that have come up since; never waits."""
        self._poll()
        self._settle()

    def available(self) -> dict[str, Member]:
        """Return the members that Flower sees now and that are not at work; those that owe a late reply only if no other is
        there.
        """
        online = self._exchange.online() - self._exchange.at_work
        present = {name: member for name, member in sorted(self.members.items()) if member.node in online}
        free = {name: member for name, member in present.items() if member.node not in self._exchange.busy}
        return free or present

    def name_of(self, node: int) -> str:
        """Return a node's site name, or a description of the node where it has none."""
        for name, member in self.members.items():
            if member.node == node:
                return name
        return f"node {node}"

    def _poll(self) -> None:
        new = self._exchange.online() - self._asked - self._resting()
        if new:
            self._pending |= self._exchange.send(dict.fromkeys(sorted(new), (self._hello, None)), group="hello")
            self._asked |= new
        for reply in self._exchange.pull(self._pending):
            self._take(reply)

    def _resting(self) -> set[int]:
        now = time.monotonic()
        return {node for node, until in self._resting_until.items() if now < until}

    def _take(self, reply: Reply) -> None:
        message = reply.message
        if isinstance(message, Introduction):
            self._waiting[reply.node] = message
            self._reasons.pop(f"node {reply.node}", None)
        elif isinstance(message, Failure) and message.error == "FlowerError" and not self._fixed_sites:
            self._greet_later(reply.node, AGAIN_S)
            self._leave_out(f"node {reply.node}", f"{message.error}: {message.reason}; it is greeted again")
        elif isinstance(message, Failure):
            self._leave_out(message.site or f"node {reply.node}", f"{message.error}: {message.reason}")
            if message.retry_s:
                self._greet_later(reply.node, max(message.retry_s, AGAIN_S))
        else:
            self._leave_out(f"node {reply.node}", f"it answered {message.kind!r} to a greeting")

    def _greet_later(self, node: int, seconds: float) -> None:
        self._asked.discard(node)
        self._resting_until[node] = time.monotonic() + seconds

    def _settle(self) -> None:
        """Decide what the federation holds, once, and let in who agrees."""
        if not self._waiting:
            return
        if self.agreement is None:
            stated = {str(node): message.agreement for node, message in sorted(self._waiting.items())}
            self.agreement = common_ground(stated)
        for node, message in sorted(self._waiting.items()):
            self._let_in(node, message, self.agreement)
        self._waiting.clear()

    def _let_in(self, node: int, message: Introduction, agreement: Agreement) -> None:
        try:
            check_agreement(agreement, message.agreement, message.site)
            _check_layout(message)
            rank_at(self._config, message)
        except (AgreementError, ConfigError, LayoutError) as error:
            self._leave_out(message.site, str(error))
            return
        holder = self.members.get(message.site)
        if holder and holder.node != node and holder.node in self._exchange.online():
            self._leave_out(f"{message.site} (node {node})", f"another node already takes part as {message.site!r}")
            return
        self.members[message.site] = Member(node, message)
        self._reasons.pop(message.site, None)

    def _leave_out(self, site: str, reason: str) -> None:
        if self._reasons.get(site) == reason:
            return
        self._reasons[site] = reason
        self._on_left_out(site, reason)

    def _too_few(self, min_sites: int, seconds: float) -> str:
        reasons = _grouped(self._reasons)
        return explain(
            f"too few sites joined within {seconds:.0f} s",
            expected=f"at least {min_sites} (rounds.min_sites)",
            found=f"{len(self.members)}" + (f"; left out: {reasons}" if reasons else ""),
            fix="Mend what each site reports, or lower rounds.min_sites.",
        )


def _check_layout(message: Introduction) -> None:
    digest = Layout.from_json(message.layout).digest
    if digest != message.agreement.layout:
        raise LayoutError(
            explain("a site's layout is not the one it stated", expected=message.agreement.layout, found=digest)
        )


def _grouped(reasons: dict[str, str]) -> str:
    """Join reasons, naming the sites that share one together."""
    groups: dict[str, list[str]] = {}
    for site, reason in sorted(reasons.items()):
        groups.setdefault(reason, []).append(site)
    return " | ".join(f"{', '.join(sites)}: {reason}" for reason, sites in groups.items())
