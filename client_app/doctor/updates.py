"""The update service: does the way there work, up to the server that checks tickets.

A real ticket exists only inside a run, in a message to one site. So a ticket that nobody issued is presented: the refusal
comes from the update server itself, which proves network, TLS, gateway and protocol, and nothing about real tickets.
"""

from __future__ import annotations

from collections.abc import Iterator

from client_app.doctor.address import Address, examine_address
from client_app.doctor.case import Case
from client_app.doctor.finding import Finding, Status, failure, ok, warning
from fedllm.errors import FedLLMError
from fedllm.wire.client import UpdateClient

NO_RUN = "Nothing to do if no run is under way: its update server comes and goes with it. Else ask the operator."


def examine_updates(case: Case) -> Iterator[Finding]:
    """Connect to the update service as a round does."""
    if case.run.transport.kind == "flower":
        yield ok("updates", "not needed: the run's updates travel in Flower's messages")
        return
    if not case.updates:
        fix = "Name the server with --server HOST:PORT, or the service itself as transport.address in the site's file."
        yield warning("updates", "not looked at, because the service's address is not known", fix)
        return
    address = Address.parse(case.updates)
    if case.updates != case.server:
        for finding in examine_address("updates", address, case.tls):
            yield finding
            if finding.status is Status.FAILURE:
                return
    yield _present_nonsense(case, address)


def _present_nonsense(case: Case, address: Address) -> Finding:
    try:
        client = UpdateClient(str(address), tls=case.tls, insecure=case.owner.transport.insecure)
        client.probe()
    except FedLLMError as error:
        return _judge(str(error), address)
    return ok("updates", f"the update server at {address} refused a ticket that nobody issued, as it should")


def _judge(error: str, address: Address) -> Finding:
    if any(f"status: {code}" in error for code in (502, 503, 504)):
        return warning("updates", f"the gateway at {address} has no update server behind it now", NO_RUN)
    if "UNIMPLEMENTED" in error or "status: 404" in error:
        fix = "Ask the operator to let the gateway forward the update service, or correct transport.address."
        return failure("updates", f"whoever answers at {address} does not offer the update service", fix)
    return failure("updates", error, "Check transport.address and the lines on certificates; else ask the operator.")
