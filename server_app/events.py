"""What is written down about a run: one event a line of ``metrics.jsonl``.

Losses are means over predicted tokens in nats, accuracies shares of predicted tokens in 0 to 1, times seconds. A loss
that is not finite is written as the string ``"NaN"`` or ``"Infinity"``, since JSON has no number for it.

Evolution: later releases add kinds and keys; those that exist keep their meaning. Readers ignore what they do not know.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fedllm.runs import Event, read_metrics

logger = logging.getLogger(__name__)


LATE, SILENT = "Late", "Silent"
"""Kinds of rejections that are no error's name."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True, ser_json_inf_nan="strings")


class _Event(_Part):
    event: str
    time: float = Field(default_factory=time.time)
    """Seconds since 1970 at which the event was made."""


class Measured(_Part):
    """One evaluation on held-out text."""

    loss: float
    accuracy: float = math.nan
    num_tokens: int = 0
    num_examples: int = 0


class Evaluation(_Event):
    """The global adapter on held-out text after a round; round 0 is the base."""

    event: Literal["evaluation"] = "evaluation"
    round: int
    sites: dict[str, Measured]
    loss: float
    """Mean over all sites' tokens."""
    accuracy: float = math.nan
    worst_loss: float = math.nan
    worst_site: str = ""
    central: Measured | None = None
    """The server's own held-out text, if it has any."""
    attack_success: float | None = None
    """Share of held-out questions that a simulated backdoor has answered with its target; None without one."""
    bytes_down: int = 0
    """Payload bytes from the server to all sites."""
    seconds: float = 0.0


class Rejection(_Part):
    """A site whose reply could not be used in a round."""

    site: str
    reason: str
    kind: str = ""
    """The error's name, as the site states it where it is the site's; :data:`SILENT` without a reply,
    :data:`LATE` for a reply to an earlier round."""


class SiteRound(_Part):
    """One site's work in one round."""

    loss: float = math.nan
    weight: float = 0.0
    num_tokens: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    staleness: int = 0
    """Rounds that had passed since the one that the site was asked in."""
    rank: int = 0
    """LoRA components that it trained, 0 for all of the adapter's."""
    next_rank: int = 0
    """LoRA components that it goes on with from the next round, having given up the others; 0 where it keeps all."""
    note: str = ""
    """What the site says a person should know."""


class Cut(_Part):
    """A site that counted less than it claims, by `strategy.max_weight_share`."""

    site: str
    claimed: float
    """Share of the round's weight by what the sites say of themselves; of its group's where sites are in groups."""
    counted: float
    """Share that it had."""


class Round(_Event):
    """A round, or as ``attempt`` one that changed nothing, for want of a quorum or of a usable aggregate."""

    event: Literal["round", "attempt"] = "round"
    round: int
    attempt: int = 1
    participants: tuple[str, ...] = ()
    """Sites whose updates were used."""
    rejected: tuple[Rejection, ...] = ()
    train_loss: float | None = None
    """Mean over the participants."""
    reason: str = ""
    """Why the updates of an attempt could not be aggregated; empty where they were too few."""
    sites: dict[str, SiteRound] = {}
    cut: tuple[Cut, ...] = ()
    """Sites that counted less than they claim."""
    update_norm: float | None = None
    """Euclidean norm of the aggregated delta, or of the change of the products where those are averaged."""
    discarded_energy: float | None = None
    """Share of the mean product's squared norm that did not fit into the next adapter; None where products are not
    averaged. Its root is the round's relative error."""
    bytes_up: int = 0
    """Payload bytes from all sites to the server."""
    bytes_down: int = 0
    """Payload bytes from the server to all sites."""
    phases: dict[str, float] = {}
    """Seconds of each phase, in the order in which they ran."""
    seconds: float = 0.0


class Groups(_Event):
    """The sites were divided into groups with a global adapter each."""

    event: Literal["groups"] = "groups"
    round: int
    """The round whose updates they were found from."""
    groups: dict[str, int]
    """Group by site, numbered from 0, the largest."""
    silhouette: float = math.nan
    """How clearly the groups stand out, -1 to 1; not a number where all sites stay together."""


class LeftOut(_Event):
    """A site that joined but cannot take part in this run."""

    event: Literal["left_out"] = "left_out"
    site: str
    reason: str


class LocalResult(Measured):
    """A site that trained alone, on its own held-out text."""

    loss_all_sites: float | None = None
    """The same adapter on all sites' held-out text."""


class LocalOnly(_Event):
    """Every site trained alone for as many steps as in the federation."""

    event: Literal["local_only"] = "local_only"
    sites: dict[str, LocalResult]
    loss: float
    """Mean over all sites' tokens, each site with its own adapter."""
    seconds: float = 0.0


class PersonalResult(Measured):
    """A site's own adapter on its own held-out text."""

    federated: float
    """Loss of the last global adapter alone."""


class Personalised(_Event):
    """Every site's own adapter, made of the last global one, what the site keeps, and further steps on its own data."""

    event: Literal["personalised"] = "personalised"
    num_steps: int = 0
    sites: dict[str, PersonalResult]
    loss: float
    """Mean over all sites' tokens, each site with its own adapter."""
    federated: float
    """The same with the last global adapter alone."""
    seconds: float = 0.0


class Answer(_Event):
    """One prompt answered with the base and with the final global adapter."""

    event: Literal["answer"] = "answer"
    prompt: str
    site: str
    base: str
    federated: str


class End(_Event):
    """The run's last event."""

    event: Literal["end"] = "end"
    status: Literal["finished", "failed", "stopped"]
    reason: str = ""
    best_round: int | None = None
    seconds: float = 0.0


AnyEvent = Evaluation | Round | Groups | LeftOut | LocalOnly | Personalised | Answer | End
KINDS: dict[str, type[AnyEvent]] = {
    "evaluation": Evaluation,
    "round": Round,
    "attempt": Round,
    "groups": Groups,
    "left_out": LeftOut,
    "local_only": LocalOnly,
    "personalised": Personalised,
    "answer": Answer,
    "end": End,
}
_ADAPTER: TypeAdapter[AnyEvent] = TypeAdapter(Annotated[AnyEvent, Field(discriminator="event")])


def parse_event(raw: Mapping[str, object]) -> AnyEvent:
    """Check one event; keys that are not known here are kept.

    Raises:
        pydantic.ValidationError: Its kind is unknown, or a known key is missing or malformed.
    """
    return _ADAPTER.validate_python(raw)


def read_events(path: Path) -> list[AnyEvent]:
    """Return a run's events of the kinds known here, in order; a malformed one is left out with a warning.

    Raises:
        CheckpointError: A line before the last is not an event at all.
    """
    parsed = (_parse(raw, path) for raw in read_metrics(path) if raw["event"] in KINDS)
    return [event for event in parsed if event is not None]


def _parse(raw: Event, path: Path) -> AnyEvent | None:
    try:
        return parse_event(raw)
    except ValidationError as error:
        logger.warning("left out a malformed %r event of %s: %s", raw["event"], path, error.errors()[0]["msg"])
        return None
