"""Between the server and the site's work: what is asked is held against the data owner's file and written down.

Every message of a deployed site passes :func:`attend`. It goes in this order: the message is written to the audit log; the
rules decide; the work is done; the numbers of the answer are rounded; the answer is written to the log; then it leaves.
What cannot be written down is not done. In simulation there is no data owner, so nothing is refused and nothing written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from client_app.audit.notes import Notes, audit_log
from client_app.doctor.case import Case
from client_app.doctor.certificates import NEW_KIT, broken_certificates
from client_app.observability.tally import Tally
from client_app.policy.rounds import count_round
from client_app.policy.rules import Asked, Refusal, fingerprint_refusals, refusals, refused
from client_app.policy.sharing import disclosed, sharing_refusals
from client_app.site import SiteConfig, load_site_config
from client_app.workplace import SITE_CONFIG_KEY, Workplace
from fedllm.errors import ConfigError, FedLLMError, explain
from fedllm.messages import AnyMessage, Instruction, TrainInstruction
from fedllm.provenance import own_app
from fedllm.wire.transport import Envelope

Perform = Callable[..., tuple[AnyMessage, Envelope | None]]
"""Does the work: :func:`client_app.tasks.perform`, which is imported only where there is work."""

MAX_REASON_CHARS = 4000


def attend(
    instruction: Instruction, envelope: Envelope, workplace: Workplace, perform: Perform
) -> tuple[AnyMessage, Envelope | None]:
    """Do what is asked, if the data owner allows it, and return the answer as it may leave.

    Raises:
        PolicyError: The data owner does not allow it.
        ConfigError: The site's certificate does not hold.
        AuditError: It cannot be written down.
        FedLLMError: The work cannot be done.
    """
    owner = workplace.owner
    if owner is None:
        return perform(instruction, envelope, workplace)
    notes, tally = Notes(owner, instruction), Tally(owner, instruction)
    notes.received(envelope, own_app())
    try:
        admit(owner, instruction, own_app(), local_time())
        check_certificates(owner, instruction)
        reply, back = perform(instruction, envelope, workplace)
        reply = disclosed(reply, owner.sharing)
    except Exception as error:
        notes.failed(error, reason_of(error))
        tally.failed(error)
        raise
    notes.sent(reply, back)
    tally.done(reply, back)
    return reply, back


def admit(owner: SiteConfig, instruction: Instruction, app: str, now: datetime) -> None:
    """Hold an instruction against the data owner's file; a round that is admitted is counted.

    Args:
        owner: The file.
        instruction: What is asked.
        app: ``publisher/name`` of the app that runs.
        now: Local time.

    Raises:
        PolicyError: With everything that is not allowed.
    """
    own = owner.adapter
    asked = Asked(instruction, instruction.read_config(), app, now, own.rank, own.num_virtual_tokens)
    found = refusals(owner.policy, asked)
    found += sharing_refusals(owner.sharing, instruction)
    if not found and isinstance(instruction, TrainInstruction):
        found = count_round(owner.paths.state_dir, owner.policy, instruction.run, instruction.request, now)
    if found:
        raise refused(found, owner.site.name, owner.file)


def check_certificates(owner: SiteConfig, instruction: Instruction) -> None:
    """Say what is wrong with the site's certificate where a run needs it; the gateway would only cut the connection.

    Raises:
        ConfigError: It has ended, does not hold yet, or is of another authority.
    """
    if instruction.read_config().transport.kind == "grpc" and (found := broken_certificates(Case(owner))):
        raise ConfigError(explain("; ".join(found), where=owner.transport.certificate, fix=NEW_KIT))


def write_down_unreadable(node_config: Mapping[str, object], error: FedLLMError) -> None:
    """Write down that a message came which is none of ours, in deployment."""
    path = node_config.get(SITE_CONFIG_KEY)
    if isinstance(path, str):
        audit_log(load_site_config(Path(path))).append(
            "unreadable", error=type(error).__name__, reason=reason_of(error)
        )


def check_base(owner: SiteConfig, fingerprint: str) -> None:
    """Hold the base that was really loaded against the data owner's file.

    Raises:
        PolicyError: It is not allowed.
    """
    if found := list(fingerprint_refusals(owner.policy, fingerprint)):
        raise refused(found, owner.site.name, owner.file)


def check_examples(owner: SiteConfig, num_examples: int) -> None:
    """Hold the number of training examples against the data owner's file; the refusal does not tell it.

    Raises:
        PolicyError: There are too few.
    """
    fewest = owner.policy.min_examples
    if num_examples < fewest:
        problem, expected = "the site has too few examples to train on", f"at least {fewest}"
        raise refused([Refusal(problem, "policy.min_examples", expected, "fewer")], owner.site.name, owner.file)


def reason_of(error: Exception) -> str:
    """Return what the server is told about an error: ours as words, others not at all, since they can hold data."""
    if isinstance(error, FedLLMError):
        return str(error)[:MAX_REASON_CHARS]
    return "an unexpected error; the site's log has the details"


def local_time() -> datetime:
    """Return the machine's local time."""
    return datetime.now()
