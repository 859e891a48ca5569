"""The first global state: drawn from the seed where that is possible, else made by a site.

Every site states the name of the first state that it makes for itself (:attr:`fedllm.agreement.Agreement.initial`), so
whatever a site hands in is checked against what all others have; see docs/decisions/first-state.md.
"""

from __future__ import annotations

import logging

from fedllm.agreement import Agreement
from fedllm.codecs.payload import open_payload
from fedllm.errors import AgreementError, FedLLMError, TransportError, UpdateError, explain
from fedllm.messages import Failure, FirstStateInstruction, FirstStateReport
from fedllm.model.initial import can_be_drawn, initial_arrays
from fedllm.update import Arrays, Layout, digest_arrays, zeros
from fedllm.work import adapter_of, control_of
from server_app.exchange import Deadline, Reply
from server_app.federation import Federation

log = logging.getLogger(__name__)

_ROUND = 0


def first_arrays(federation: Federation, layout: Layout, agreement: Agreement) -> Arrays:
    """Return the first global state: the adapter as every site makes it for itself, control variates of zero.

    Args:
        federation: What the phases share.
        layout: The state's layout.
        agreement: What the sites state.

    Raises:
        AgreementError: The server draws another adapter than the sites, or no site hands in the one that they state.
    """
    return _adapter(federation, adapter_of(layout), agreement) | zeros(control_of(layout))


def _adapter(federation: Federation, layout: Layout, agreement: Agreement) -> Arrays:
    if can_be_drawn(layout):
        arrays = initial_arrays(layout, federation.config.seed)
        _check(arrays, layout, agreement, "the server")
        return arrays
    problems = []
    for site in federation.roster.available():
        try:
            arrays = _made_by(federation, site, layout, agreement)
        except FedLLMError as error:
            log.warning("%s did not hand in the first state: %s", site, error)
            problems.append(f"{site}: {error}")
        else:
            log.info("%s handed in the first state, which all sites make alike", site)
            return arrays
    found = "; ".join(problems) or "no site is there"
    raise AgreementError(explain("no site handed in the first state", expected=agreement.initial, found=found))


def _made_by(federation: Federation, site: str, layout: Layout, agreement: Agreement) -> Arrays:
    """Have one site make the first state.

    Raises:
        FedLLMError: It does not, or hands in something else.
    """
    transport, max_bytes = federation.transport, federation.config.transport.max_update_bytes
    transport.open_round(_ROUND)
    try:
        reply = _asked(federation, site, max_bytes)
        path = transport.receive(round_=_ROUND, site=site, reply=reply.envelope)
        with open_payload(path, layout=layout, base=agreement.base, max_bytes=max_bytes, kind="state") as payload:
            arrays = {name: payload.read(name) for name in payload.names}
        path.unlink()
    finally:
        transport.close_round(_ROUND)
    _check(arrays, layout, agreement, site)
    return arrays


def _asked(federation: Federation, site: str, max_bytes: int) -> Reply:
    node = federation.roster.members[site].node
    envelope = federation.transport.offer(round_=_ROUND, site=site, state_id=None, max_update_bytes=max_bytes)
    instruction = FirstStateInstruction.model_validate(federation.instruction)
    pending = federation.exchange.send({node: (instruction, envelope)}, group="first-state")
    deadline = Deadline(federation.config.rounds.deadline_s)
    for reply in federation.exchange.replies(pending, deadline):
        if isinstance(reply.message, Failure):
            raise UpdateError(f"{reply.message.error}: {reply.message.reason}")
        if not isinstance(reply.message, FirstStateReport):
            found = reply.message.kind
            raise TransportError(explain("a site answered something else", expected="first-state-made", found=found))
        return reply
    raise TransportError(explain("a site did not answer in time", where=site))


def _check(arrays: Arrays, layout: Layout, agreement: Agreement, maker: str) -> None:
    found = digest_arrays(arrays, layout)
    if found != agreement.initial:
        raise AgreementError(
            explain(f"the first state of {maker} is not the sites'", expected=agreement.initial, found=found)
        )
