"""The site's model and data for one run, and the few things done with them.

The base and the tokenised data are kept for the life of the process. In simulation a worker process serves many messages
and several sites, so the base is loaded once per process; in deployment Flower starts a process per message and the
base comes from the cache on disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from peft import PeftModel

from client_app.attacks import backdoor_probe, simulated_attack
from client_app.courier import Courier
from client_app.gate import check_base, check_examples
from client_app.progress import Progress
from client_app.training import StepControl, StepReport, TrainPlan, TrainResult, train
from client_app.workplace import Workplace
from fedllm import rng
from fedllm.agreement import Agreement, describe_quantization
from fedllm.config import RunConfig
from fedllm.data.batches import batch_stream
from fedllm.data.prepare import SiteData, prepare_site
from fedllm.lora.choice import pruned_spec
from fedllm.lora.mixed import mixed_as_one
from fedllm.messages import Instruction, Score, StateInstruction, TrainInstruction
from fedllm.model.build import (
    LoadedBase,
    adapter_target_modules,
    cached_base,
    first_values,
    only_trainable,
)
from fedllm.model.dual import NUM_REFERENCES, ByLikeness, mixed
from fedllm.model.evaluate import evaluate_loss
from fedllm.model.export import save_peft_adapter
from fedllm.model.fitted import FittedAdapter, fit_adapter
from fedllm.model.generate import answer, without_adapter
from fedllm.model.prompts.attach import num_used, use_first
from fedllm.model.prompts.places import unpacked
from fedllm.model.prompts.tensors import with_first_tokens
from fedllm.model.spec import LoraSpec
from fedllm.provenance import versions
from fedllm.update import Arrays, Layout, digest_arrays
from fedllm.wire.transport import Envelope

log = logging.getLogger(__name__)

Part = Callable[[PeftModel], AbstractContextManager[None]]
"""Leaves something of a model away for a while."""

OWN_ADAPTER = "adapter"
"""Folder of the state directory that holds the site's own adapter after a run."""


@dataclass(frozen=True)
class Session:
    """One site's model and data, ready for work.

    Attributes:
        workplace: Name, folders and hardware.
        config: The effective run config.
        base: The quantized base and its fingerprints.
        adapter: The federation's adapter on that base.
        data: Tokenised training text and hold-out.
    """

    workplace: Workplace
    config: RunConfig
    base: LoadedBase
    adapter: FittedAdapter
    data: SiteData

    @property
    def model(self) -> PeftModel:
        """The base with the adapter attached."""
        return self.adapter.model

    @property
    def layout(self) -> Layout:
        """The layout of the federation's adapter."""
        return self.adapter.layout

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
            initial=digest_arrays(self.first_values(), self.layout),
        )

    def first_values(self) -> Arrays:
        """Return what the federation's adapter starts from, made from the base and the run's seed alone."""
        return first_values(self.base, self.config.spec.adapter, self.layout, self.config.seed)

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

    def courier(self, instruction: StateInstruction, envelope: Envelope) -> Courier:
        """Return what carries an instruction's state in and its update out."""
        workplace = self.workplace
        return Courier(
            instruction=instruction,
            envelope=envelope,
            config=self.config,
            site=workplace.site,
            state_dir=workplace.state_dir,
            adapter=self.layout,
            first_values=self.first_values,
            rank=self.adapter.rank,
            base=self.base.fingerprint,
            owner=workplace.owner,
            attack=simulated_attack(self.config, workplace),
        )

    def load(self, arrays: Arrays) -> None:
        """Put an adapter's values into the model."""
        self.adapter.write(arrays)

    def train(
        self,
        start: Arrays,
        part: Layout,
        *,
        first_step: int,
        num_steps: int,
        round_: int,
        title: str,
        total_steps: int | None = None,
        control: StepControl | None = None,
        truncated: bool = False,
        share: float = 0.0,
    ) -> tuple[TrainResult, Arrays]:
        """Train an adapter, or the site's part of it, and return the result and the trained values.

        Args:
            start: Where to start.
            part: The tensors to train; the others stay as they are, and so do side factors, which nobody trains.
            first_step: Index of the first step among all steps of the federation.
            num_steps: Steps to take.
            round_: The round, for the draws.
            title: What the progress bar says.
            total_steps: Steps that the learning rate's course stretches over, None for those of the federation.
            control: What changes the gradients of the steps, None for nothing.
            truncated: Train without what is not the site's part.
            share: Share of the site's own adapter in the sum of the two, 0 where it does not compute.
        """
        part = part.only([name for name in part.names if name in self.adapter.own_layout])
        self.adapter.write(start, truncated=truncated)
        drawn = rng.derive(self.config.seed, round_, self.workplace.site, "training")
        plan = self._plan(first_step, num_steps, total_steps or self.config.total_steps, drawn)
        seed = rng.derive(self.config.seed, round_, self.workplace.site, "batches")
        batches = batch_stream(self.data.train, plan.batch_size, seed)
        mix = mixed(self.model, share) if share else nullcontext()
        with mix, Progress(title, num_steps) as progress, only_trainable(self.model, part) as parameters:

            def show(report: StepReport) -> None:
                progress.step(f"loss {report.loss:.3f}")

            if control:
                control.begin(parameters)
            result = train(self.model, batches, plan, control=control, on_step=show)
        return result, self.adapter.read(start)

    @property
    def num_virtual_tokens(self) -> int:
        """How many of the soft prompt's shared tokens the site uses, 0 for all."""
        adapter = self.config.spec.adapter
        used = 0 if isinstance(adapter, LoraSpec) else num_used(self.model)
        return 0 if isinstance(adapter, LoraSpec) or used == adapter.num_virtual_tokens else used

    def export(self, adapter: Arrays, share: float = 0.0) -> None:
        """Leave an adapter for PEFT in the state directory, as the site's own; of two, their sum at a fixed share."""
        folder, source, layout = self.workplace.state_dir / OWN_ADAPTER, self.config.model.source, self.layout
        spec = self.config.spec
        if share and isinstance(spec.adapter, LoraSpec):
            one, layout, adapter = mixed_as_one(spec.adapter, layout, adapter, share)
            spec = spec.model_copy(update={"adapter": one})
        if self.num_virtual_tokens:
            adapter, layout = with_first_tokens(adapter, layout, self.num_virtual_tokens)
        save_peft_adapter(folder, layout, adapter, spec, self.target_modules, source)
        log.info("the site's own adapter is in %s", folder)

    def score(self, part: Part | None = None, share: float = 0.0) -> Score:
        """Evaluate the model on the hold-out: as it is, or a part of it, such as :func:`without_adapter` leaves.

        Args:
            part: Leaves something away.
            share: Largest share of the site's own adapter, by likeness of the example; 0 where it does not compute.
        """
        around = self._by_likeness(share).applied if share else None
        with part(self.model) if part else nullcontext():
            totals = evaluate_loss(self.model, self.data.holdout, self.config.train.batch_size * 4, around)
        return Score(
            loss=totals.loss,
            accuracy=totals.accuracy,
            num_tokens=totals.num_targets,
            num_examples=len(self.data.holdout),
        )

    def attack_success(self, part: Part | None = None) -> float | None:
        """Return how often a simulated backdoor opens with what the model computes, or a part of it; None without one."""
        if not self.data.probe:
            return None
        with part(self.model) if part else nullcontext():
            totals = evaluate_loss(self.model, self.data.probe, self.config.train.batch_size * 4)
        return totals.num_exact / len(self.data.probe)

    def answer(self, prompt: str, share: float = 0.0) -> tuple[str, str]:
        """Answer a prompt with the base alone and with the adapter, or with both adapters as in :meth:`score`."""
        limit = self.config.evaluation.max_new_tokens
        with without_adapter(self.model):
            plain = answer(self.model, self.base.tokenizer, prompt, limit)
        around = self._by_likeness(share).applied_to if share else None
        return plain, answer(self.model, self.base.tokenizer, prompt, limit, around=around)

    def _by_likeness(self, share: float) -> ByLikeness:
        """Return what gives an example its share of the site's own adapter, from some of the site's training examples."""
        examples = [one for row in self.data.train for one in unpacked(row) if one.num_targets]
        draw = rng.generator(self.config.seed, 0, self.workplace.site, "references")
        chosen = draw.choice(len(examples), min(NUM_REFERENCES, len(examples)), replace=False)
        return ByLikeness.of(self.model, share, [examples[index] for index in sorted(chosen)])

    def _plan(self, first_step: int, num_steps: int, total_steps: int, seed: int) -> TrainPlan:
        train_ = self.config.train
        return TrainPlan(
            steps=num_steps,
            first_step=first_step,
            total_steps=total_steps,
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


def open_session(instruction: Instruction, workplace: Workplace) -> Session:
    """Build what an instruction needs: model, adapter, data.

    Raises:
        ConfigError: The run config is wrong.
        DataError: The data cannot be read.
        ModelError: The base cannot be found or adapted.
        PolicyError: The data owner does not allow this base, or there are too few examples.
    """
    config = instruction.read_config()
    owner = workplace.owner
    base = cached_base(config.model, home=workplace.home, cache_dir=workplace.cache_dir, device=workplace.device)
    if owner:
        check_base(owner, base.fingerprint)
    adapter = fit_adapter(base, config.spec.adapter, *_own_adapter(instruction, workplace, config))
    if not isinstance(config.spec.adapter, LoraSpec):
        use_first(adapter.model, config.spec.adapter.own_length(workplace.prompt_length(config)))
    data = _prepare(workplace, config, base)
    if owner:
        check_examples(owner, data.report.train.num_examples)
    return Session(workplace=workplace, config=config, base=base, adapter=adapter, data=data)


def _own_adapter(instruction: Instruction, workplace: Workplace, config: RunConfig) -> tuple[int, float]:
    """Return the LoRA rank and alpha to train with, 0 for the run's: what the site chose, less what it has given up."""
    rank, alpha = workplace.own_adapter(config)
    remaining = instruction.rank if isinstance(instruction, TrainInstruction) else 0
    if not remaining or not isinstance(config.spec.adapter, LoraSpec):
        return rank, alpha
    pruned = pruned_spec(config.spec.adapter, rank, alpha, remaining)
    return pruned.rank, pruned.alpha


def _prepare(workplace: Workplace, config: RunConfig, base: LoadedBase) -> SiteData:
    key = (workplace, workplace.data_config(config).model_dump_json(), config.simulation.model_dump_json(), config.seed)
    if key not in _PREPARED:
        examples = workplace.examples(config)
        attack = simulated_attack(config, workplace)
        poison = attack.poison if attack else None
        probe, data = backdoor_probe(config, workplace), workplace.data_config(config)
        _PREPARED[key] = prepare_site(examples, base.tokenizer, data, config.seed, poison, probe)
    return _PREPARED[key]


_PREPARED: dict[tuple[Workplace, str, str, int], SiteData] = {}
