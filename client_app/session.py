"""The site's model and data for one run, and the few things done with them.

The base and the tokenised data are kept for the life of the process. In simulation a worker process serves many messages
and several sites, so the base is loaded once per process; in deployment Flower starts a process per message and the
base comes from the cache on disk.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel

from client_app.attacks import simulated_attack
from client_app.memory import Memory
from client_app.progress import Progress
from client_app.training import StepReport, TrainPlan, TrainResult, train
from client_app.transports import build_transport
from client_app.workplace import Workplace
from fedllm import rng
from fedllm.agreement import Agreement, describe_quantization
from fedllm.codecs.feedback import ErrorFeedback, relative_norm
from fedllm.codecs.payload import encode_payload, open_payload
from fedllm.codecs.pipeline import parse
from fedllm.config import RunConfig
from fedllm.data.batches import batch_stream
from fedllm.data.prepare import SiteData, prepare_site
from fedllm.errors import AgreementError, CorruptPayloadError, StaleStateError, explain
from fedllm.messages import Instruction, Score, StateInstruction, TrainInstruction
from fedllm.model.build import (
    LoadedBase,
    adapter_target_modules,
    attach_adapter,
    cached_base,
    layout_of,
    only_trainable,
    read_adapter,
    write_adapter,
)
from fedllm.model.evaluate import evaluate_loss
from fedllm.model.generate import answer, without_adapter
from fedllm.model.initial import initial_arrays
from fedllm.provenance import versions
from fedllm.update import Arrays, Layout, digest_arrays, taken
from fedllm.wire.transport import Envelope

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """One site's model and data, ready for work.

    Attributes:
        workplace: Name, folders and hardware.
        config: The effective run config.
        base: The quantized base and its fingerprints.
        model: The base with the adapter attached.
        layout: The adapter's layout.
        data: Tokenised training text and hold-out.
    """

    workplace: Workplace
    config: RunConfig
    base: LoadedBase
    model: PeftModel
    layout: Layout
    data: SiteData

    @property
    def memory(self) -> Memory:
        """What the site remembers of this run."""
        return Memory(self.workplace.state_dir, self.layout, self.base.fingerprint)

    @property
    def agreement(self) -> Agreement:
        """What this site holds."""
        model, releases = self.config.model, versions()
        return Agreement(
            fedllm_version=releases["fedllm"],
            flower_version=releases["flwr"],
            base=self.base.fingerprint,
            tokenizer=self.base.tokenizer_digest,
            quantization=describe_quantization(model.quantization, model.double_quantization),
            layout=self.layout.digest,
        )

    @property
    def target_modules(self) -> list[str]:
        """Names of the adapted modules."""
        return adapter_target_modules(self.model)

    @property
    def summary(self) -> str:
        """One line about the site for its log."""
        train_, holdout = self.data.report.train, self.data.report.holdout
        source = "cache" if self.base.from_cache else "source"
        return (
            f"{train_.num_examples} examples ({train_.num_target_tokens} target tokens) to train on, "
            f"{holdout.num_examples} held out; base from {source} in {self.base.seconds:.1f} s"
        )

    def obtain(self, instruction: StateInstruction, envelope: Envelope) -> Arrays:
        """Return the global state that an instruction starts from, the same bits as at every other site.

        Raises:
            AgreementError: The server's layout or base is another one.
            StaleStateError: The site does not hold what the server thought.
            PayloadError: What arrived is not the state.
        """
        self._check_agreed(instruction)
        held = self.memory.held(instruction.state_id)
        if held is not None:
            return held
        arrays = self._received(instruction, envelope)
        found = digest_arrays(arrays, self.layout)
        if found != instruction.state_id:
            raise CorruptPayloadError(
                explain("a state has another name after decoding", expected=instruction.state_id, found=found)
            )
        self.memory.hold(instruction.state_id, arrays, getattr(instruction, "round", 0))
        return arrays

    def _received(self, instruction: StateInstruction, envelope: Envelope) -> Arrays:
        if instruction.delivery == "initial":
            return initial_arrays(self.layout, self.config.seed)
        reference = None
        if instruction.delivery != "full":
            reference = self.memory.held(instruction.reference_id)
        if instruction.delivery == "held" or (instruction.delivery == "difference" and reference is None):
            wanted = instruction.reference_id or instruction.state_id
            raise StaleStateError(explain("the site does not hold a state", expected=wanted, where="state directory"))
        part = self.layout.only(instruction.tensors) if instruction.tensors else self.layout
        path = build_transport(envelope, self.workplace.owner).fetch(envelope, self.memory.folder / "arrived.payload")
        with open_payload(
            path,
            layout=part,
            base=self.base.fingerprint,
            kind="state",
            reference_id=instruction.reference_id,
            reference=reference,
        ) as payload:
            arrays = {name: payload.restore(name) for name in payload.names}
        path.unlink()
        return (reference or initial_arrays(self.layout, self.config.seed)) | arrays

    def load(self, arrays: Arrays) -> None:
        """Put a state into the model."""
        write_adapter(self.model, self.layout, arrays)

    def encode(self, instruction: TrainInstruction, received: Arrays, trained: Arrays) -> tuple[Path, float]:
        """Encode what a round changed, with what earlier rounds left unsent.

        Returns:
            The update's file, and the norm of what is left unsent now over the norm of the update, 0 without feedback.
        """
        part = instruction.work.sent(self.layout)
        delta: Arrays = {name: trained[name] - received[name] for name in part.names}
        if (attack := simulated_attack(self.config, self.workplace)) is not None:
            delta = attack.distort(delta, instruction.round)
        transport, round_ = self.config.transport, instruction.round
        feedback = None
        if transport.error_feedback and not parse(transport.uplink).is_lossless:
            feedback = ErrorFeedback(transport.feedback_beta, transport.feedback_max_age)
        intended = self._compensated(feedback, delta, part, instruction) if feedback else delta
        path = self.memory.update_path(round_)
        info = encode_payload(
            path,
            intended,
            part,
            kind="update",
            round_=round_,
            base=self.base.fingerprint,
            pipeline=transport.uplink,
            reference_id=instruction.state_id,
            reference=taken(received, part),
            is_difference=True,
            seed=self.config.seed,
            site=self.workplace.site,
            site_index=instruction.site_index,
            want_decoded=feedback is not None,
        )
        if feedback is None or info.decoded is None:
            return path, 0.0
        residual = feedback.residual(intended, info.decoded)
        self.memory.keep_residual(round_, part, residual)
        return path, relative_norm(residual, delta)

    def _compensated(
        self, feedback: ErrorFeedback, delta: Arrays, part: Layout, instruction: TrainInstruction
    ) -> Arrays:
        left = self.memory.residual(instruction.round, part, instruction.last_folded)
        return feedback.compensate(delta, feedback.carried(*left) if left else None)

    def push(self, update: Path, envelope: Envelope) -> Envelope:
        """Deliver an encoded update; return what goes into the reply."""
        return build_transport(envelope, self.workplace.owner).push(envelope, update)

    def train(
        self, start: Arrays, part: Layout, *, first_step: int, num_steps: int, round_: int, title: str
    ) -> tuple[TrainResult, Arrays]:
        """Train from a state and return the result and the trained arrays.

        Args:
            start: Where to start.
            part: The tensors to train; the others stay as they are.
            first_step: Index of the first step among all steps of the federation.
            num_steps: Steps to take.
            round_: The round, for the draws.
            title: What the progress bar says.
        """
        self.load(start)
        plan = self._plan(first_step, num_steps, rng.derive(self.config.seed, round_, self.workplace.site, "training"))
        seed = rng.derive(self.config.seed, round_, self.workplace.site, "batches")
        batches = batch_stream(self.data.train, plan.batch_size, seed)
        with Progress(title, num_steps) as progress:

            def show(report: StepReport) -> None:
                progress.step(f"loss {report.loss:.3f}")

            with only_trainable(self.model, part):
                result = train(self.model, batches, plan, on_step=show)
        return result, read_adapter(self.model, self.layout)

    def score(self) -> Score:
        """Evaluate the model as it is on the hold-out."""
        totals = evaluate_loss(self.model, self.data.holdout, self.config.train.batch_size * 4)
        return Score(
            loss=totals.loss,
            accuracy=totals.accuracy,
            num_tokens=totals.num_targets,
            num_examples=len(self.data.holdout),
        )

    def answer(self, prompt: str) -> tuple[str, str]:
        """Answer a prompt with the base alone and with the adapter."""
        limit = self.config.evaluation.max_new_tokens
        with without_adapter(self.model):
            plain = answer(self.model, self.base.tokenizer, prompt, limit)
        return plain, answer(self.model, self.base.tokenizer, prompt, limit)

    def _plan(self, first_step: int, num_steps: int, seed: int) -> TrainPlan:
        train_ = self.config.train
        return TrainPlan(
            steps=num_steps,
            first_step=first_step,
            total_steps=self.config.total_steps,
            batch_size=train_.batch_size,
            accumulation=train_.accumulation,
            optimizer=train_.optimizer,
            learning_rate=train_.learning_rate,
            schedule=train_.schedule,
            warmup_fraction=train_.warmup_fraction,
            weight_decay=train_.weight_decay,
            max_grad_norm=train_.max_grad_norm,
            compute_dtype=self.config.model.compute_dtype,
            deterministic=self.config.deterministic,
            num_threads=self.workplace.num_threads or train_.num_threads,
            seed=seed,
        )

    def _check_agreed(self, instruction: StateInstruction) -> None:
        pairs = {"layout": (instruction.layout, self.layout.digest), "base": (instruction.base, self.base.fingerprint)}
        for what, (theirs, ours) in pairs.items():
            if theirs != ours:
                fix = "Bring the site to the federation's model, or leave it out."
                raise AgreementError(explain(f"the {what} differs", expected=theirs, found=ours, fix=fix))


def open_session(instruction: Instruction, workplace: Workplace) -> Session:
    """Build what an instruction needs: model, adapter, data.

    Raises:
        ConfigError: The run config is wrong.
        DataError: The data cannot be read.
        ModelError: The base cannot be found or adapted.
    """
    config = instruction.read_config()
    base = cached_base(config.model, home=workplace.home, cache_dir=workplace.cache_dir, device=workplace.device)
    model = attach_adapter(base, config.adapter)
    return Session(
        workplace=workplace,
        config=config,
        base=base,
        model=model,
        layout=layout_of(model),
        data=_prepare(workplace, config, base),
    )


def _prepare(workplace: Workplace, config: RunConfig, base: LoadedBase) -> SiteData:
    key = (workplace, workplace.data_config(config).model_dump_json(), config.simulation.model_dump_json(), config.seed)
    if key not in _PREPARED:
        examples = workplace.examples(config)
        attack = simulated_attack(config, workplace)
        poison = attack.poison if attack else None
        _PREPARED[key] = prepare_site(examples, base.tokenizer, workplace.data_config(config), config.seed, poison)
    return _PREPARED[key]


_PREPARED: dict[tuple[Workplace, str, str, int], SiteData] = {}
