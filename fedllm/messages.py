"""What server and site say to each other, as checked data.

Every message is one JSON text of at most :data:`MAX_MESSAGE_CHARS`, carried by Flower beside at most one packed blob
(:mod:`fedllm.records`). Evolution: a field may be added with a default; a field never changes meaning; a new meaning is
a new field and a new :data:`PROTOCOL`.

Each instruction is complete in itself, because Flower starts a new process for every message in deployment.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fedllm.agreement import Agreement
from fedllm.config import RunConfig, Scalar, read_run_config
from fedllm.errors import TransportError, explain
from fedllm.work import ClientWork

PROTOCOL = 1
MAX_MESSAGE_CHARS = 32 << 20

Finite = Annotated[float, Field(allow_inf_nan=False)]
MAX_COUNT = 1 << 53
"""As many as a float64 holds exactly: what a site claims to have is multiplied and added as one."""
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Message(BaseModel):
    """Base of all messages: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: Literal[1] = 1


class Instruction(Message):
    """What the server asks of a site.

    Attributes:
        run: The run's name.
        run_folder: The run's folder on the server; a site uses it in simulation only, where both are one machine.
        config: The effective run config in Flower's flat form.
    """

    run: str
    run_folder: str
    config: dict[str, Scalar]

    def read_config(self) -> RunConfig:
        """Return the checked run config."""
        return read_run_config(self.config)


class Hello(Instruction):
    """Build the model, read the data, and say what you hold."""

    kind: Literal["hello"] = "hello"


class DataCounts(Message):
    """How much data a site has; counts only, never content."""

    num_train_examples: Count
    num_train_tokens: Count
    num_train_targets: Count
    num_holdout_examples: Count
    num_holdout_targets: Count
    num_truncated: Count
    num_dropped: Count
    topics: dict[str, int] = {}


class Introduction(Message):
    """A site's answer to :class:`Hello`.

    Attributes:
        layout: The adapter's layout as JSON text, whose digest is in the agreement.
        target_modules: Names of the adapted modules, for PEFT's config.
        base_load_s: Seconds that loading the base took, and whether it came from the cache.
        rank: LoRA components that the site trains, 0 for as many as the run's adapter has.
        alpha: LoRA alpha that it trains with, 0 for the run's.
    """

    kind: Literal["introduction"] = "introduction"
    site: Name
    agreement: Agreement
    layout: str
    target_modules: list[str]
    data: DataCounts
    base_load_s: float
    base_from_cache: bool
    rank: int = Field(0, ge=0)
    alpha: float = Field(0.0, ge=0, allow_inf_nan=False)


class FirstStateInstruction(Instruction):
    """Make the first global state and hand it in, because it starts from the base, which the server does not have."""

    kind: Literal["first-state"] = "first-state"


class FirstStateReport(Message):
    """The first global state travels beside it."""

    kind: Literal["first-state-made"] = "first-state-made"
    site: Name


Delivery = Literal["held", "initial", "full", "difference"]


class StateInstruction(Instruction):
    """An instruction that starts from a global state.

    Attributes:
        state_id: Name of the state: :func:`fedllm.update.digest_arrays` of what a site decodes.
        delivery: How the site gets it: it holds it already, it makes the first one for itself, it fetches it whole, or it
            fetches the difference to the state `reference_id`, which it holds.
        tensors: Names of the tensors that are fetched, empty for all. The others are as in the state `reference_id`, or,
            where the state is fetched whole, as in the first one.
        layout: Digest of the adapter's layout.
        base: Fingerprint that the payloads carry.
        work: What to do with the state.
    """

    state_id: str
    delivery: Delivery
    reference_id: str = ""
    tensors: tuple[str, ...] = ()
    layout: str
    base: str
    work: ClientWork = ClientWork()


class TrainInstruction(StateInstruction):
    """Train from the global state for one round and hand in the delta.

    Attributes:
        first_step: Index of the round's first local step among all steps of the federation.
        last_folded: The last round of the same work in which this site's update was folded, 0 for none: what it may
            forget.
        site_index: The site's number among the sites asked, for round-robin codecs.
        num_sites: Sites asked in this round, this one included; 0 where the server does not say.
        rank: LoRA components to train, 0 for as many as the site chose: fewer where it has given some up.
    """

    kind: Literal["train"] = "train"
    round: int = Field(ge=1)
    attempt: int = Field(ge=1)
    last_folded: int = Field(0, ge=0)
    site_index: int = Field(0, ge=0)
    num_sites: int = Field(0, ge=0)
    first_step: int = Field(ge=0)
    rank: int = Field(0, ge=0)

    @property
    def request(self) -> str:
        """A name for what is asked, the same when it is asked again; 64 hexadecimal digits."""
        varying = {"attempt", "delivery", "reference_id", "tensors", "run_folder", "num_sites"}
        return hashlib.sha256(self.model_dump_json(exclude=varying).encode()).hexdigest()


class TrainReport(Message):
    """A site's account of its training; the delta travels beside it.

    Attributes:
        loss: Mean loss over the round's target tokens. It, `loss_last` and `grad_norm` are None where the site's data
            owner does not share them.
        residual_norm: Norm of what error feedback keeps back, over the norm of the update; 0 without.
        tensors: Names of the tensors that the site chose to send, empty where it has no choice.
        num_virtual_tokens: How many virtual tokens of a soft prompt the site used, the first ones; 0 for all.
        next_rank: LoRA components that the site goes on with, having given up the others; 0 where it keeps all.
        note: What a person should know about this round at this site, empty for nothing.
    """

    kind: Literal["trained"] = "trained"
    site: Name
    round: int
    num_examples: Positive
    num_tokens: Positive
    num_steps: Positive
    loss: Finite | None
    loss_last: Finite | None
    grad_norm: Finite | None
    seconds: Finite
    residual_norm: Finite = 0.0
    tensors: tuple[str, ...] = ()
    num_virtual_tokens: int = Field(0, ge=0)
    next_rank: int = Field(0, ge=0)
    note: str = Field("", max_length=500)
    phases: dict[str, Finite] = {}


class EvaluateInstruction(StateInstruction):
    """Evaluate the global state on the site's hold-out; in round 0 the base alone.

    Attributes:
        prompt: A question to answer with the base and with the state, empty for none.
    """

    kind: Literal["evaluate"] = "evaluate"
    round: int = Field(ge=0)
    prompt: str = ""


class Score(Message):
    """Loss on held-out text.

    Attributes:
        loss: Mean cross-entropy over target tokens, in nats.
        accuracy: Share of target tokens that the model ranks first.
    """

    loss: Finite
    accuracy: Annotated[float, Field(ge=0, le=1)]
    num_tokens: Positive
    num_examples: Positive


class EvaluateReport(Message):
    """A site's held-out score of the global state.

    Attributes:
        attack_success: Share of held-out questions that are answered with a simulated backdoor's target once they end with
            its trigger; None without one, as outside simulation.
    """

    kind: Literal["evaluated"] = "evaluated"
    site: Name
    round: int
    score: Score
    attack_success: Annotated[float, Field(ge=0, le=1)] | None = None
    answer_base: str = ""
    answer: str = ""
    seconds: Finite


class LocalOnlyInstruction(StateInstruction):
    """Train alone from the first global state for as many steps as the federation took, and evaluate.

    The trained adapter stays at the site; only scores come back.
    """

    kind: Literal["local-only"] = "local-only"
    num_steps: int = Field(ge=1)


class LocalOnlyReport(Message):
    """The held-out score of a site's own training."""

    kind: Literal["local-only-done"] = "local-only-done"
    site: Name
    score: Score
    num_steps: int
    seconds: Finite


class PersonaliseInstruction(StateInstruction):
    """Make the site's own adapter from the last global state, keep it, and evaluate both.

    Attributes:
        num_steps: Steps of training on the site's own data, 0 for none.
    """

    kind: Literal["personalise"] = "personalise"
    round: int = Field(ge=0)
    num_steps: int = Field(ge=0)


class PersonaliseReport(Message):
    """The held-out scores of the global state and of the site's own adapter, which stays at the site."""

    kind: Literal["personalised"] = "personalised"
    site: Name
    federated: Score
    personalised: Score
    num_steps: int
    seconds: Finite


class Failure(Message):
    """A site could not or would not do what it was asked.

    Attributes:
        error: Class of the error, for example ``DataError``.
        reason: What happened, in words that hold no data content.
        retry_s: Seconds after which asking again can help, 0 for never.
    """

    kind: Literal["failure"] = "failure"
    site: str
    error: str
    reason: str = Field(max_length=4000)
    retry_s: float = Field(0.0, ge=0, allow_inf_nan=False)


AnyMessage = Annotated[
    Hello
    | Introduction
    | FirstStateInstruction
    | FirstStateReport
    | TrainInstruction
    | TrainReport
    | EvaluateInstruction
    | EvaluateReport
    | LocalOnlyInstruction
    | LocalOnlyReport
    | PersonaliseInstruction
    | PersonaliseReport
    | Failure,
    Field(discriminator="kind"),
]


_ADAPTER: TypeAdapter[AnyMessage] = TypeAdapter(AnyMessage)


def parse_message(text: str, where: str) -> AnyMessage:
    """Read one message.

    Raises:
        TransportError: The text is too long, not JSON, of an unknown kind, or a field is refused.
    """
    if len(text) > MAX_MESSAGE_CHARS:
        raise TransportError(explain("a message is too long", expected=MAX_MESSAGE_CHARS, found=len(text), where=where))
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise TransportError(explain(f"a message cannot be read: {place}: {first['msg']}", where=where)) from error
