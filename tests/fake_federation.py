"""A federation without Flower's network and without a language model, for tests of the round loop.

:class:`InProcessGrid` is a whole `Grid`: it carries real Flower messages to functions that stand for sites.
:class:`QuadraticSite` is a whole site: real messages, real payloads, a real transport; its objective is
``|x - optimum|^2 / 2`` instead of a language model's loss, so that every result is known in closed form.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Error, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from client_app.courier import LOST, Courier
from client_app.transports import build_transport
from fedllm import rng
from fedllm.agreement import Agreement
from fedllm.codecs.payload import encode_payload, open_payload
from fedllm.errors import FedLLMError, StaleStateError
from fedllm.lora.alignment import aligned
from fedllm.messages import (
    AnyMessage,
    DataCounts,
    EvaluateInstruction,
    EvaluateReport,
    Failure,
    Hello,
    Introduction,
    LocalOnlyInstruction,
    LocalOnlyReport,
    PersonaliseInstruction,
    PersonaliseReport,
    Score,
    StateInstruction,
    TrainInstruction,
    TrainReport,
)
from fedllm.model.initial import initial_arrays
from fedllm.records import from_records, to_records
from fedllm.update import Arrays, Layout, TensorSpec, digest_arrays, taken
from fedllm.wire.transport import Envelope

LAYOUT = Layout(
    (
        TensorSpec("base_model.model.layers.0.q_proj.lora_A.weight", (2, 6), role="lora_A"),
        TensorSpec("base_model.model.layers.0.q_proj.lora_B.weight", (5, 2), role="lora_B"),
    )
)
AGREEMENT = Agreement(
    fedllm_version="1",
    flower_version="2",
    base="b" * 64,
    tokenizer="t",
    quantization="nf4",
    layout=LAYOUT.digest,
    initial=digest_arrays(initial_arrays(LAYOUT, 42), LAYOUT),
)


def first_values() -> Arrays:
    """Return what the adapter starts from."""
    return initial_arrays(LAYOUT, 42)


Handler = Callable[[FlowerMessage], FlowerMessage | None]


class InProcessGrid(Grid):
    """Carries messages to functions; a function that returns None never replies.

    Args:
        handlers: What answers for each node, by node id.
    """

    def __init__(self, handlers: dict[int, Handler]) -> None:
        # Flower sets these when it starts a ServerApp; a message cannot be made without them.
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self.handlers = handlers
        self.delays: dict[int, float] = {}
        self._replies: dict[str, tuple[float, FlowerMessage]] = {}
        self._count = 0

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> FlowerMessage:
        raise NotImplementedError

    def send_and_receive(self, *args: Any, **kwargs: Any) -> Iterable[FlowerMessage]:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.handlers)

    def get_nodes(self) -> list[Any]:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[FlowerMessage]) -> list[str]:
        ids = []
        for message in messages:
            self._count += 1
            id_ = f"m{self._count}"
            message.metadata.__dict__["_message_id"] = id_
            node = message.metadata.dst_node_id
            reply = self.handlers[node](message)
            if reply is not None:
                self._replies[id_] = (time.monotonic() + self.delays.get(node, 0.0), reply)
            ids.append(id_)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[FlowerMessage]:
        now = time.monotonic()
        ready = [id_ for id_ in message_ids if id_ in self._replies and self._replies[id_][0] <= now]
        return [self._replies.pop(id_)[1] for id_ in ready]


class QuadraticSite:
    """A site whose best adapter is `optimum`; one round moves the received adapter the share `rate` towards it.

    Args:
        name: The site's name.
        seed: Draws the optimum.
        num_examples: What it says it has.
        agreement: What it says it holds.
    """

    def __init__(
        self, name: str, seed: int, num_examples: int = 10, agreement: Agreement = AGREEMENT, rate: float = 0.5
    ) -> None:
        draw = rng.generator(seed, purpose="optimum")
        self.name, self.num_examples, self.agreement, self.rate = name, num_examples, agreement, rate
        self.optimum: Arrays = {
            spec.name: draw.standard_normal(spec.shape).astype(np.float32) for spec in LAYOUT.tensors
        }
        self.folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.seen: list[AnyMessage] = []
        self.held: dict[str, Arrays] = {}
        self.deliveries: list[str] = []

    def __call__(self, message: FlowerMessage) -> FlowerMessage | None:
        instruction, envelope = from_records(message.content, "test")
        self.seen.append(instruction)
        try:
            reply, back = self.answer(instruction, envelope)
        except FedLLMError as error:
            reply, back = Failure(site=self.name, error=type(error).__name__, reason=str(error)), None
        return FlowerMessage(to_records(reply, back), reply_to=message)

    def answer(self, instruction: AnyMessage, envelope: Envelope) -> tuple[AnyMessage, Envelope | None]:
        match instruction:
            case Hello():
                return self.introduce(), None
            case TrainInstruction():
                return self.train(instruction, envelope)
            case EvaluateInstruction():
                score = self.score(self.fetch(instruction, envelope))
                answers = {"answer_base": "before", "answer": "after"} if instruction.prompt else {}
                return EvaluateReport(
                    site=self.name, round=instruction.round, score=score, seconds=0.1, **answers
                ), None
            case LocalOnlyInstruction():
                state = self.moved(self.fetch(instruction, envelope))
                report = LocalOnlyReport(
                    site=self.name, score=self.score(state), num_steps=instruction.num_steps, seconds=0.1
                )
                return report, None
            case PersonaliseInstruction():
                return self.personalise(instruction, envelope), None
        raise AssertionError(instruction)

    def personalise(self, instruction: PersonaliseInstruction, envelope: Envelope) -> PersonaliseReport:
        state = self.fetch(instruction, envelope)
        own = self.moved(state) if instruction.num_steps else state
        return self.personal_report(instruction, state, own)

    def personal_report(self, instruction: PersonaliseInstruction, state: Arrays, own: Arrays) -> PersonaliseReport:
        scores = {"federated": self.score(state), "personalised": self.score(own)}
        return PersonaliseReport(site=self.name, num_steps=instruction.num_steps, seconds=0.1, **scores)

    def introduce(self) -> Introduction:
        data = DataCounts(
            num_train_examples=self.num_examples,
            num_train_tokens=100,
            num_train_targets=50,
            num_holdout_examples=4,
            num_holdout_targets=20,
            num_truncated=0,
            num_dropped=0,
        )
        return Introduction(
            site=self.name,
            agreement=self.agreement,
            layout=LAYOUT.to_json(),
            target_modules=["q_proj"],
            data=data,
            base_load_s=0.0,
            base_from_cache=True,
        )

    def fetch(self, instruction: StateInstruction, envelope: Envelope) -> Arrays:
        """Get the state in the way that the server chose, as a real site does."""
        self.deliveries.append(instruction.delivery)
        state = self.held.get(instruction.state_id)
        if state is None:
            state = self.receive(instruction, envelope)
            assert digest_arrays(state, LAYOUT) == instruction.state_id
            self.held = {instruction.state_id: state}
        return state

    def receive(self, instruction: StateInstruction, envelope: Envelope) -> Arrays:
        if instruction.delivery == "initial":
            return initial_arrays(LAYOUT, 42)
        reference = self.held.get(instruction.reference_id)
        if instruction.delivery == "held" or (instruction.delivery == "difference" and reference is None):
            raise StaleStateError("not held")
        path = build_transport(envelope, None).fetch(envelope, self.folder / "state")
        part = LAYOUT.only(instruction.tensors) if instruction.tensors else LAYOUT
        with open_payload(path, layout=part, base=self.agreement.base, reference=reference) as payload:
            arrays = {name: payload.restore(name) for name in payload.names}
        return (reference or initial_arrays(LAYOUT, 42)) | arrays

    def moved(self, state: Arrays, part: Layout | None = None) -> Arrays:
        names = part.names if part else tuple(state)
        return state | {
            name: state[name] + np.float32(self.rate) * (self.optimum[name] - state[name]) for name in names
        }

    def score(self, state: Arrays) -> Score:
        loss = sum(float(np.sum((state[name] - self.optimum[name]) ** 2)) / 2 for name in state)
        return Score(loss=loss, accuracy=0.5, num_tokens=20, num_examples=4)

    def train(self, instruction: TrainInstruction, envelope: Envelope) -> tuple[AnyMessage, Envelope | None]:
        state = self.fetch(instruction, envelope)
        moved = self.moved(state, instruction.work.trained(LAYOUT))
        delta = {name: moved[name] - state[name] for name in state}
        return self.report(instruction, state), self.push(instruction, envelope, delta)

    def report(self, instruction: TrainInstruction, state: Arrays, **changes: Any) -> TrainReport:
        fields = {
            "site": self.name,
            "round": instruction.round,
            "num_examples": self.num_examples,
            "num_tokens": 50,
            "num_steps": 2,
            "loss": self.score(state).loss,
            "loss_last": 0.0,
            "grad_norm": 1.0,
            "seconds": 0.1,
        }
        return TrainReport.model_validate({**fields, **changes})

    def push(self, instruction: TrainInstruction, envelope: Envelope, delta: Arrays, **changes: Any) -> Envelope:
        path, part = self.folder / "update", instruction.work.sent(LAYOUT)
        fields = {"round_": instruction.round, "base": self.agreement.base, "reference_id": instruction.state_id}
        held = self.held.get(instruction.state_id)
        encode_payload(
            path,
            taken(delta, part),
            part,
            kind="update",
            pipeline=instruction.read_config().transport.uplink,
            is_difference=True,
            reference=taken(held, part) if held else None,
            site=self.name,
            site_index=instruction.site_index,
            seed=42,
            **{**fields, **changes},
        )
        return build_transport(envelope, None).push(envelope, path)


def flower_error(message: FlowerMessage, reason: str = "ClientApp stopped responding") -> FlowerMessage:
    """Return what Flower answers for a site whose process died."""
    return FlowerMessage(Error(code=3, reason=reason), reply_to=message)


def empty_reply(message: FlowerMessage) -> FlowerMessage:
    """Return a reply without any record of ours."""
    return FlowerMessage(RecordDict(), reply_to=message)


class LocalSite(QuadraticSite):
    """A site with a real site's files: it obtains, keeps and encodes with the real courier, and takes gradient steps.

    Its objective is ``sum(curvature (x - optimum)^2) / 2``; the gradient's corrections are written out here once more, in
    float64, so that they check the strategies and not themselves.

    Args:
        name: The site's name.
        seed: Draws optimum and curvature.
        folder: Its state directory; a second site in the same folder goes on where the first one was.
        num_examples: What it says it has.
        num_steps: Local gradient steps a round.
        step_size: Their size.
    """

    def __init__(
        self, name: str, seed: int, folder: Path, num_examples: int = 10, num_steps: int = 5, step_size: float = 0.1
    ) -> None:
        super().__init__(name, seed, num_examples)
        draw = rng.generator(seed, purpose="curvature")
        self.curvature: Arrays = {spec.name: draw.uniform(0.2, 2.0, spec.shape) for spec in LAYOUT.tensors}
        self.folder, self.num_steps, self.step_size = folder, num_steps, step_size

    def courier(self, instruction: StateInstruction, envelope: Envelope) -> Courier:
        return Courier(
            instruction=instruction,
            envelope=envelope,
            config=instruction.read_config(),
            site=self.name,
            state_dir=self.folder,
            adapter=LAYOUT,
            first_values=first_values,
            rank=2,
            base=self.agreement.base,
            owner=None,
        )

    def fetch(self, instruction: StateInstruction, envelope: Envelope) -> Arrays:
        self.deliveries.append(instruction.delivery)
        courier = self.courier(instruction, envelope)
        return courier.own(courier.obtain(), getattr(instruction, "round", 0))[0]

    def score(self, state: Arrays) -> Score:
        loss = sum(float(np.sum(self.curvature[n] * (state[n] - self.optimum[n]) ** 2)) / 2 for n in LAYOUT.names)
        return Score(loss=loss, accuracy=0.5, num_tokens=20, num_examples=4)

    def train(self, instruction: TrainInstruction, envelope: Envelope) -> tuple[AnyMessage, Envelope | None]:
        courier, work = self.courier(instruction, envelope), instruction.work
        received = courier.obtain()
        start, note = courier.own(received, instruction.round - 1)
        variates = courier.variates(received)
        part = work.trained(LAYOUT)
        correction = {name: variates.correction(name).astype(np.float64) for name in part.names} if variates else None
        trained = self.descend(start, part, work.proximal, correction)
        change = None
        if variates and correction:
            moved = {name: (start[name] - trained[name]) / (self.num_steps * self.step_size) for name in part.names}
            change = variates.change({name: (moved[name] - correction[name]).astype(np.float32) for name in moved})
        trained32 = {name: value.astype(np.float32) for name, value in trained.items()}
        if work.alignment:
            trained32 = aligned(trained32, received, work.alignment, instruction.round)
        update = courier.encode(received, trained32, change)
        if variates:
            variates.keep(instruction.round, update.decoded)
        fields = {"note": note or (LOST if variates and variates.was_lost else ""), "tensors": update.tensors}
        return self.report(instruction, start, **fields), courier.push(update.path)

    def personalise(self, instruction: PersonaliseInstruction, envelope: Envelope) -> PersonaliseReport:
        state = self.courier(instruction, envelope).obtain()
        return self.personal_report(instruction, state, self.fetch(instruction, envelope))

    def descend(self, start: Arrays, part: Layout, proximal: float, correction: Arrays | None) -> dict[str, Any]:
        """Take the local steps in float64."""
        local: dict[str, Any] = {name: value.astype(np.float64) for name, value in start.items()}
        for _ in range(self.num_steps):
            for name in part.names:
                gradient = self.curvature[name] * (local[name] - self.optimum[name])
                gradient = gradient + proximal * (local[name] - start[name])
                local[name] = local[name] - self.step_size * (gradient + (correction[name] if correction else 0.0))
        return local
