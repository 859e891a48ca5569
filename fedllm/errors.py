"""Every error that fedllm raises on purpose, as one tree.

::

    FedLLMError
    ├── ConfigError        a setting is unknown, malformed or contradicts another   (ValueError)
    ├── DataError          local data is missing, unreadable or too small           (ValueError)
    ├── ModelError         a base model cannot be found, read or adapted            (ValueError)
    ├── PolicyError        a site's data owner does not allow what is asked         (ValueError)
    ├── AgreementError     two parties do not hold the same base, tokenizer, layout (ValueError)
    ├── UpdateError        a peer's contribution cannot be used                     (ValueError)
    │   ├── LayoutError        names, shapes or dtypes differ from the layout
    │   ├── NonFiniteError     it holds NaN or infinity
    │   └── PayloadError       its bytes are not a payload of the announced kind
    │       ├── TruncatedPayloadError   fewer bytes than announced
    │       ├── CorruptPayloadError     a checksum or an invariant does not hold
    │       ├── OversizedPayloadError   more bytes than the layout can need
    │       └── PayloadVersionError     written by a format this release does not read
    ├── TransportError     bytes could not be moved                                 (RuntimeError)
    │   ├── TicketError        a ticket is wrong, expired, used or foreign
    │   └── StaleStateError    a site lacks the state that it was thought to hold
    ├── TrainingError      local training cannot go on (a non-finite loss)          (RuntimeError)
    ├── QuorumError        too few usable replies, repeatedly                       (RuntimeError)
    ├── CheckpointError    a run's folder cannot be written, read or resumed        (RuntimeError)
    ├── AuditError         a site's audit log cannot be written or read             (RuntimeError)
    └── CancelledError     the run was stopped while work was under way             (RuntimeError)

A message says what was expected, what was found, where, and what to do; :func:`explain` keeps that order.
"""

from __future__ import annotations


class FedLLMError(Exception):
    """Base of all errors that fedllm raises on purpose."""


class ConfigError(FedLLMError, ValueError):
    """A setting is unknown, malformed or contradicts another."""


class DataError(FedLLMError, ValueError):
    """Local data is missing, unreadable or too small."""


class ModelError(FedLLMError, ValueError):
    """A base model cannot be found, read or adapted."""


class PolicyError(FedLLMError, ValueError):
    """A site's data owner does not allow what is asked.

    Args:
        message: What is not allowed, and by which setting.

    Attributes:
        retry_s: Seconds after which asking again can help, 0 for never.
    """

    def __init__(self, message: str, retry_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class AgreementError(FedLLMError, ValueError):
    """Two parties do not hold the same base, tokenizer, quantization or layout."""


class UpdateError(FedLLMError, ValueError):
    """A peer's contribution cannot be used."""


class LayoutError(UpdateError):
    """Names, shapes or dtypes differ from the layout that both ends agreed on."""


class NonFiniteError(UpdateError):
    """An array holds NaN or infinity."""


class PayloadError(UpdateError):
    """Bytes are not a payload of the announced kind."""


class TruncatedPayloadError(PayloadError):
    """A payload ends before the size that it announces."""


class CorruptPayloadError(PayloadError):
    """A checksum or an invariant of a payload does not hold."""


class OversizedPayloadError(PayloadError):
    """A payload announces or holds more bytes than its layout can need."""


class PayloadVersionError(PayloadError):
    """A payload was written by a format or stage version that this release does not read."""


class TransportError(FedLLMError, RuntimeError):
    """Bytes could not be moved between server and site."""


class TicketError(TransportError):
    """A ticket is wrong, expired, already used, or made for someone else."""


class StaleStateError(TransportError):
    """A site lacks the state that the server thought it held; it needs the whole state."""


class TrainingError(FedLLMError, RuntimeError):
    """Local training cannot go on."""


class QuorumError(FedLLMError, RuntimeError):
    """Too few usable replies arrived, repeatedly."""


class CheckpointError(FedLLMError, RuntimeError):
    """A run's folder cannot be written, read or resumed."""


class AuditError(FedLLMError, RuntimeError):
    """A site's audit log cannot be written or read."""


class CancelledError(FedLLMError, RuntimeError):
    """The run was stopped while work was under way."""


def explain(
    problem: str,
    *,
    expected: object | None = None,
    found: object | None = None,
    where: object | None = None,
    fix: str | None = None,
) -> str:
    """Compose an error message: what is wrong, expected, found, where, what to do.

    Args:
        problem: One clause without a full stop.
        expected: What would have been right.
        found: What there was instead.
        where: The file, key, node or tensor concerned.
        fix: What the reader can do about it.
    """
    parts = [problem]
    parts += [f"expected {expected}"] if expected is not None else []
    parts += [f"found {found}"] if found is not None else []
    parts += [f"in {where}"] if where is not None else []
    message = "; ".join(parts)
    return f"{message}. {fix}" if fix else f"{message}."
