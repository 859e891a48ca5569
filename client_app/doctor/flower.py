"""Flower's interface behind the gateway: is it there, does its clock agree, and is no more open than need be.

The time comes from the ``Date`` header of whoever answers, which is the gateway where there is one. Flower refuses a
SuperNode whose clock is more than 5 s ahead of the server's or 305 s behind it.
"""

from __future__ import annotations

import email.utils
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from client_app.doctor.address import TIMEOUT_S, Address, context_for, examine_address
from client_app.doctor.case import Case
from client_app.doctor.finding import Finding, Status, failure, ok, warning

MAX_AHEAD_S, MAX_BEHIND_S = 5.0, 305.0
"""Flower 1.41's limits on a SuperNode's clock (``flwr.supercore.constant``)."""

NEAR_AHEAD_S, NEAR_BEHIND_S = 2.0, 60.0
"""Where the warning begins."""

FLEET_PATH, CONTROL_PATH = "/v1/fleet/pull-messages", "/v1/control/start-run"
"""Paths that take POST only: a GET does nothing, and is refused with 405 by a SuperLink that can be reached."""

METHOD_REFUSED = 405


def examine_flower(case: Case) -> Iterator[Finding]:
    """Look at the server that the SuperNode will connect to."""
    if not case.server:
        fix = "Name it with --server HOST:PORT; the operator knows it."
        yield warning("server", "not looked at, because its address is not known", fix)
        return
    address = Address.parse(case.server)
    for finding in examine_address("server", address, case.tls):
        yield finding
        if finding.status is Status.FAILURE:
            return
    verify = context_for(case.tls) if case.tls else False
    scheme = "https" if case.tls else "http"
    try:
        with httpx.Client(base_url=f"{scheme}://{address}", verify=verify, timeout=TIMEOUT_S) as client:
            yield from _ask(client)
    except httpx.HTTPError as error:
        fix = "Ask the operator whether the gateway and the SuperLink run."
        yield failure("flower", f"{address} does not answer as HTTP: {error or type(error).__name__}", fix)


@dataclass(frozen=True)
class Drift:
    """How far this machine's clock is from a server's.

    Attributes:
        ahead_s: Seconds that it is ahead; negative where it is behind.
        within_s: How wrong that may be: the header counts whole seconds, and travels.
    """

    ahead_s: float
    within_s: float


def drift(date: str, sent: float, received: float) -> Drift | None:
    """Compare a ``Date`` header with this machine's time.

    Args:
        date: The header.
        sent: Seconds since the epoch by this machine's clock when the request went out.
        received: And when the answer was here.

    Returns:
        None where the header is no date.
    """
    try:
        theirs = email.utils.parsedate_to_datetime(date).timestamp() + 0.5
    except ValueError:
        return None
    return Drift((sent + received) / 2 - theirs, 0.5 + (received - sent) / 2)


def examine_clock(found: Drift | None) -> Finding:
    """Judge a clock by what Flower allows."""
    if found is None:
        fix = "Have this machine's clock set by NTP."
        return warning("clock", "the server's answer has no date to compare with", fix)
    side = "ahead of" if found.ahead_s > 0 else "behind"
    message = f"{abs(found.ahead_s):.1f} s {side} the server's (give or take {found.within_s:.1f} s)"
    facts = {"ahead_s": round(found.ahead_s, 3), "within_s": round(found.within_s, 3)}
    limits = f"Flower allows {MAX_AHEAD_S:g} s ahead and {MAX_BEHIND_S:g} s behind"
    fix = "Have this machine's clock set by NTP (timedatectl set-ntp true, or chrony)."
    if found.ahead_s - found.within_s > MAX_AHEAD_S or -found.ahead_s - found.within_s > MAX_BEHIND_S:
        return failure("clock", f"{message}; {limits}", fix, **facts)
    if found.ahead_s - found.within_s > NEAR_AHEAD_S or -found.ahead_s - found.within_s > NEAR_BEHIND_S:
        return warning("clock", f"{message}; {limits}", fix, **facts)
    return ok("clock", message, **facts)


def _ask(client: httpx.Client) -> Iterator[Finding]:
    sent = time.time()
    health = client.get("/health")
    received = time.time()
    if health.status_code != httpx.codes.OK:
        yield _unhealthy(health.status_code)
    else:
        yield ok("flower", "the SuperLink says that it is well", status=health.status_code)
    yield examine_clock(drift(health.headers.get("date", ""), sent, received))
    yield _fleet(client.get(FLEET_PATH).status_code)
    yield from _control(client.get(CONTROL_PATH).status_code)


def _unhealthy(status: int) -> Finding:
    if status >= httpx.codes.INTERNAL_SERVER_ERROR:
        fix = "Ask the operator to start the SuperLink."
        return failure("flower", f"the gateway answers, the SuperLink behind it does not (HTTP {status})", fix)
    return failure("flower", f"no SuperLink answers here (HTTP {status})", "Check host and port.")


def _fleet(status: int) -> Finding:
    if status == METHOD_REFUSED:
        return ok("fleet", "the interface for SuperNodes can be reached", status=status)
    fix = "Ask the operator to let the gateway forward /v1/fleet/ to the SuperLink."
    return failure("fleet", f"the interface for SuperNodes cannot be reached (HTTP {status})", fix)


def _control(status: int) -> Iterator[Finding]:
    if status == METHOD_REFUSED:
        fix = "Ask the operator to put the gateway of deploy/gateway in front, which lets through what sites need."
        yield warning("control", "whoever reaches this server may start runs on every site", fix)
