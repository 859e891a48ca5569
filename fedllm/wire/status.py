"""Why the server of the update stream refuses a call, and what the client makes of it.

gRPC has one status code for many causes, so the cause itself travels as a word in the trailing metadata. An error without
that word comes from the connection (or a proxy) and not from our server.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

import grpc

from fedllm.errors import CancelledError, CorruptPayloadError, FedLLMError, TicketError, TransportError, explain

METADATA_KEY = "fedllm-reason"


class Reason(enum.StrEnum):
    """Why a call was refused."""

    TICKET = "ticket"
    """The ticket is wrong, expired, used, or allows fewer bytes."""
    CLOSED = "round-closed"
    """The round is not open, or was opened anew since the ticket was issued."""
    CORRUPT = "corrupt"
    """A checksum does not hold; what was verified before is kept."""
    OUT_OF_STEP = "out-of-step"
    """A chunk does not begin where the server stands."""
    BUSY = "busy"
    """Too many transfers are under way."""
    STALLED = "stalled"
    """Nothing moved for too long."""
    SUPERSEDED = "superseded"
    """A newer push of the same site took over."""
    STORAGE = "storage"
    """The server cannot read or write its files."""
    UNKNOWN_STATE = "unknown-state"
    """No such state is published."""
    MALFORMED = "malformed"
    """The caller broke the protocol."""


_CODES = {
    Reason.TICKET: grpc.StatusCode.PERMISSION_DENIED,
    Reason.CLOSED: grpc.StatusCode.ABORTED,
    Reason.CORRUPT: grpc.StatusCode.DATA_LOSS,
    Reason.OUT_OF_STEP: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.BUSY: grpc.StatusCode.UNAVAILABLE,
    Reason.STALLED: grpc.StatusCode.UNAVAILABLE,
    Reason.SUPERSEDED: grpc.StatusCode.ABORTED,
    Reason.STORAGE: grpc.StatusCode.INTERNAL,
    Reason.UNKNOWN_STATE: grpc.StatusCode.NOT_FOUND,
    Reason.MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
}
_ERRORS: dict[Reason, type[FedLLMError]] = {
    Reason.TICKET: TicketError,
    Reason.CLOSED: CancelledError,
    Reason.CORRUPT: CorruptPayloadError,
}
_RETRYABLE_REASONS = {Reason.CORRUPT, Reason.OUT_OF_STEP, Reason.BUSY, Reason.STALLED}
_RETRYABLE_CODES = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DATA_LOSS,
}
_TLS_FAILURES = ("CERTIFICATE_VERIFY_FAILED", "not in peer certificate", "handshake failed")


class RefusedError(TransportError):
    """A call is refused for a reason that its caller is told."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def code(self) -> grpc.StatusCode:
        """The status code that fits the reason."""
        return _CODES[self.reason]


@dataclass(frozen=True)
class Verdict:
    """What a client makes of a failed call.

    Attributes:
        error: The error in our words.
        is_retryable: Whether trying again can help.
        reason: What our server gave as the reason, or None.
    """

    error: FedLLMError
    is_retryable: bool
    reason: Reason | None = None


def judge(error: grpc.RpcError | grpc.FutureCancelledError | RefusedError, where: str) -> Verdict:
    """Turn a failed call into our error and say whether trying again can help.

    Args:
        error: What gRPC raised, or a refusal by this end of what the other sent.
        where: The server's address.
    """
    if isinstance(error, RefusedError):
        kind = _ERRORS.get(error.reason)
        return Verdict(kind(str(error)) if kind else error, error.reason in _RETRYABLE_REASONS, error.reason)
    if isinstance(error, grpc.FutureCancelledError):
        return Verdict(TransportError(explain("a transfer was cut off or stood still", where=where)), is_retryable=True)
    reason, details = _reason(error), error.details() or "no details"
    if reason is not None:
        kind = _ERRORS.get(reason, TransportError)
        return Verdict(kind(explain(details.rstrip("."), where=where)), reason in _RETRYABLE_REASONS, reason)
    if any(text in details for text in _TLS_FAILURES):
        fix = "Check the certificate's names and that both ends use the federation's CA."
        return Verdict(TransportError(explain("TLS failed", found=details, where=where, fix=fix)), is_retryable=False)
    problem = f"the connection failed with {error.code().name}"
    return Verdict(TransportError(explain(problem, found=details, where=where)), error.code() in _RETRYABLE_CODES)


def _reason(error: grpc.RpcError) -> Reason | None:
    metadata: Iterable[tuple[str, str | bytes]] = error.trailing_metadata() or ()  # type: ignore[assignment]
    words = [value for key, value in metadata if key == METADATA_KEY]
    return Reason(words[0]) if words and words[0] in set(Reason) else None
