"""What is written down: every message that came, every payload and answer that left, every refusal.

Content of data is never written, and numbers only as they left. The records of one message share run, kind and round. A
message that no answer follows was cut off, by a crash or by `flwr stop`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from client_app.audit.log import FOLDER, AuditLog
from client_app.site import SiteConfig
from fedllm.errors import PolicyError
from fedllm.messages import AnyMessage, EvaluateReport, Instruction, StateInstruction
from fedllm.wire.transport import Envelope

SETTINGS = (
    "strategy.name",
    "model.source",
    "model.quantization",
    "adapter.kind",
    "adapter.rank",
    "adapter.num_virtual_tokens",
    "adapter.num_personal_tokens",
    "num_rounds",
    "rounds.min_sites",
    "train.local_steps",
    "train.batch_size",
    "train.learning_rate",
    "transport.kind",
    "transport.uplink",
)
"""Settings of a run that a data owner wants to find in the log; the hash covers all of them."""

_NUMBERS = ("num_examples", "num_tokens", "num_steps", "loss", "loss_last", "grad_norm", "residual_norm")


def audit_log(owner: SiteConfig) -> AuditLog:
    """Return a site's log."""
    return AuditLog(owner.paths.state_dir / FOLDER)


class Notes:
    """Writes down one message and what becomes of it.

    Args:
        owner: The data owner's file.
        instruction: The message.
    """

    def __init__(self, owner: SiteConfig, instruction: Instruction) -> None:
        self._log, self._instruction = audit_log(owner), instruction
        self._about: dict[str, object] = {"run": instruction.run, "kind": getattr(instruction, "kind", "")}
        if (round_ := getattr(instruction, "round", None)) is not None:
            self._about["round"] = round_

    def received(self, envelope: Envelope, app: str) -> None:
        """Write down that the message came."""
        config, text = self._instruction.config, self._instruction.model_dump_json()
        known = {key: config[key] for key in SETTINGS if key in config}
        asked = {name: getattr(self._instruction, name) for name in _ASKED if hasattr(self._instruction, name)}
        state = self._instruction if isinstance(self._instruction, StateInstruction) else None
        if state:
            asked |= {"base": state.base, "state": state.state_id, "work": state.work.model_dump(exclude_defaults=True)}
        self._log.append(
            "received",
            **self._about,
            app=app,
            bytes=_size(text, envelope),
            sha256=_sha256(text),
            config_sha256=_sha256(repr(sorted(config.items()))),
            settings=known,
            asked=asked,
        )

    def sending(self, envelope: Envelope, payload: Path) -> None:
        """Write down that a payload leaves, before its first byte does."""
        to = {name: envelope.fields[name] for name in ("transport", "address", "port") if name in envelope.fields}
        with payload.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._log.append("sending", **self._about, to=to, bytes=payload.stat().st_size, sha256=digest)

    def sent(self, reply: AnyMessage, back: Envelope | None) -> None:
        """Write down what is answered, before it is."""
        text, payload = reply.model_dump_json(), dict(back.fields) if back else {}
        self._log.append(
            "sent",
            **self._about,
            answer=reply.kind,
            bytes=_size(text, back),
            sha256=_sha256(text),
            payload={name: payload[name] for name in ("size", "digest") if name in payload},
            numbers=_numbers(reply),
        )

    def failed(self, error: Exception, reason: str) -> None:
        """Write down that nothing is sent but this reason: a refusal, or work that could not be done."""
        event = "refused" if isinstance(error, PolicyError) else "failed"
        self._log.append(event, **self._about, error=type(error).__name__, reason=reason)


_ASKED = ("first_step", "num_steps", "num_sites", "attempt", "delivery", "prompt")


def _numbers(reply: AnyMessage) -> dict[str, object]:
    found = {name: getattr(reply, name) for name in _NUMBERS if hasattr(reply, name)}
    for name in ("data", "score", "federated", "personalised"):
        if hasattr(reply, name):
            found[name] = getattr(reply, name).model_dump(exclude={"protocol"})
    if isinstance(reply, EvaluateReport) and reply.answer:
        found["answer_characters"] = len(reply.answer) + len(reply.answer_base)
    return found


def _size(text: str, envelope: Envelope | None) -> int:
    return len(text.encode()) + (len(envelope.blob) if envelope and envelope.blob else 0)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
