"""What a site does with an instruction: greet, train, evaluate, train alone. One function each."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from client_app.courier import LOST, Courier
from client_app.session import Session, open_session
from client_app.training import DriftControl, TailPenalty
from client_app.transports import hand_over
from client_app.workplace import Workplace
from fedllm.codecs.payload import encode_payload
from fedllm.errors import TransportError, explain
from fedllm.lora.alignment import aligned
from fedllm.lora.choice import rank_without_tail
from fedllm.messages import (
    AnyMessage,
    DataCounts,
    EvaluateInstruction,
    EvaluateReport,
    FirstStateInstruction,
    FirstStateReport,
    Hello,
    Introduction,
    LocalOnlyInstruction,
    LocalOnlyReport,
    PersonaliseInstruction,
    PersonaliseReport,
    TrainInstruction,
    TrainReport,
)
from fedllm.model.generate import without_adapter
from fedllm.model.prompts.attach import without_personal
from fedllm.model.spec import LoraSpec
from fedllm.update import taken
from fedllm.wire.transport import Envelope
from fedllm.work import ClientWork, adapter_of, common_of

log = logging.getLogger(__name__)

Answer = tuple[AnyMessage, Envelope | None]


def perform(instruction: AnyMessage, envelope: Envelope, workplace: Workplace) -> Answer:
    """Do what an instruction asks.

    Raises:
        FedLLMError: The work cannot be done; the class says why.
    """
    match instruction:
        case Hello():
            return greet(instruction, workplace)
        case FirstStateInstruction():
            return make_first_state(instruction, envelope, workplace)
        case TrainInstruction():
            return train_round(instruction, envelope, workplace)
        case EvaluateInstruction():
            return evaluate(instruction, envelope, workplace)
        case LocalOnlyInstruction():
            return train_alone(instruction, envelope, workplace)
        case PersonaliseInstruction():
            return personalise(instruction, envelope, workplace)
        case _:
            raise TransportError(explain("an unknown instruction", found=instruction.kind))


def greet(instruction: Hello, workplace: Workplace) -> Answer:
    """Build the model, read the data, and state what the site holds."""
    session = open_session(instruction, workplace)
    report = session.data.report
    rank, alpha = workplace.own_adapter(session.config)
    introduction = Introduction(
        site=workplace.site,
        agreement=session.agreement,
        layout=session.layout.to_json(),
        target_modules=session.target_modules,
        data=DataCounts(
            num_train_examples=report.train.num_examples,
            num_train_tokens=report.train.num_tokens,
            num_train_targets=report.train.num_target_tokens,
            num_holdout_examples=report.holdout.num_examples,
            num_holdout_targets=report.holdout.num_target_tokens,
            num_truncated=report.train.num_truncated + report.holdout.num_truncated,
            num_dropped=report.train.num_dropped + report.holdout.num_dropped,
            topics=dict(report.topics),
        ),
        base_load_s=session.base.seconds,
        base_from_cache=session.base.from_cache,
        rank=rank,
        alpha=alpha,
    )
    log.info("%s is ready: %s", workplace.site, session.summary)
    return introduction, None


def make_first_state(instruction: FirstStateInstruction, envelope: Envelope, workplace: Workplace) -> Answer:
    """Hand in what the adapter starts from, which the server cannot make without the base."""
    session = open_session(instruction, workplace)
    path, base = workplace.state_dir / "first.payload", session.base.fingerprint
    path.parent.mkdir(parents=True, exist_ok=True)
    encode_payload(path, session.first_values(), session.layout, kind="state", round_=0, base=base, pipeline="fp32")
    back = hand_over(instruction, envelope, workplace.owner, path)
    path.unlink()
    return FirstStateReport(site=workplace.site), back


def train_round(instruction: TrainInstruction, envelope: Envelope, workplace: Workplace) -> Answer:
    """Train from the global state and hand in the delta; a request that was done before is answered from disk."""
    session = open_session(instruction, workplace)
    courier, request = session.courier(instruction, envelope), instruction.request
    done = courier.memory.finished(instruction.round, request)
    if done is None:
        update, report = _train(session, instruction, courier)
        courier.memory.finish(instruction.round, request, report.model_dump_json(), instruction.last_folded)
    else:
        update, report = done[0], TrainReport.model_validate_json(done[1])
        log.info("%s round %d was done before; sending it again", workplace.site, instruction.round)
    started = time.perf_counter()
    back = courier.push(update)
    phases = {**report.phases, "push": time.perf_counter() - started}
    return report.model_copy(update={"phases": phases}), back


def _train(session: Session, instruction: TrainInstruction, courier: Courier) -> tuple[Path, TrainReport]:
    started = time.perf_counter()
    site, work = session.workplace.site, instruction.work
    received = courier.obtain()
    fetched = time.perf_counter()
    start, note = courier.own(received, instruction.round - 1)
    part, variates = work.trained(session.layout), courier.variates(received)
    shared = adapter_of(work.sent(courier.layout))
    correction = {name: variates.correction(name) for name in shared.names} if variates else None
    drift = DriftControl(work.proximal, correction) if work.proximal or correction else None
    steps = {"first_step": instruction.first_step, "num_steps": session.config.train.local_steps}
    title, round_ = f"{site} round {instruction.round}", instruction.round
    if work.personal_share:
        own, part, share = work.kept(session.layout), shared, work.personal_share
        _, start = session.train(start, own, **steps, round_=round_, title=f"{title}, its own", share=share)
    tail, truncated = _tail(session, work), work.truncates
    result, trained = session.train(
        start, part, **steps, round_=round_, title=title, control=drift or tail, truncated=truncated
    )
    finished = time.perf_counter()
    if work.alignment:
        trained = aligned(trained, received, work.alignment, instruction.round)
    change = variates.change(drift.mean_gradients()) if variates and drift else None
    update = courier.encode(received, trained, change)
    if variates:
        variates.keep(instruction.round, update.decoded)
    ended = time.perf_counter()
    report = TrainReport(
        site=site,
        round=instruction.round,
        num_examples=session.data.report.train.num_examples,
        num_tokens=result.num_target_tokens,
        num_steps=result.num_steps,
        loss=result.loss_mean,
        loss_last=result.loss_last,
        grad_norm=result.grad_norm_mean,
        seconds=ended - started,
        residual_norm=update.residual_norm,
        tensors=update.tensors,
        num_virtual_tokens=session.num_virtual_tokens,
        next_rank=tail.first if tail and tail.shrank else 0,
        note=note or (LOST if variates and variates.was_lost else ""),
        phases={"fetch": fetched - started, "train": finished - fetched, "encode": ended - finished},
    )
    return update.path, report


def _tail(session: Session, work: ClientWork) -> TailPenalty | None:
    """Return what becomes of the site's last components, None where it keeps all."""
    adapter, rank = session.config.spec.adapter, session.adapter.rank
    fewest = adapter.min_rank if isinstance(adapter, LoraSpec) else 0
    first = rank_without_tail(rank, work.pruning, fewest)
    return TailPenalty(first, work.tail_penalty) if first < rank else None


def evaluate(instruction: EvaluateInstruction, envelope: Envelope, workplace: Workplace) -> Answer:
    """Evaluate the state, with what the site keeps in its place, on the hold-out; answer the prompt if there is one.

    Before the first round that is the base alone: a soft prompt that was not trained yet already changes what it computes.
    """
    started = time.perf_counter()
    session = open_session(instruction, workplace)
    courier = session.courier(instruction, envelope)
    adapter, _ = courier.own(courier.obtain(), instruction.round)
    session.load(adapter)
    share = instruction.work.personal_share
    part = without_adapter if instruction.round == 0 else None
    score = session.score(part, share=0.0 if part else share)
    base, tuned = session.answer(instruction.prompt, share) if instruction.prompt else ("", "")
    report = EvaluateReport(
        site=workplace.site,
        round=instruction.round,
        score=score,
        attack_success=session.attack_success(part),
        answer_base=base,
        answer=tuned,
        seconds=time.perf_counter() - started,
    )
    return report, None


def train_alone(instruction: LocalOnlyInstruction, envelope: Envelope, workplace: Workplace) -> Answer:
    """Train from the first global state on the site's own data only, with the federation's steps and schedule.

    The whole adapter is trained, whatever part of it the federation trains: it is what a site would do by itself. There is
    no second adapter then.
    """
    started = time.perf_counter()
    session = open_session(instruction, workplace)
    courier = session.courier(instruction, envelope)
    result, _ = session.train(
        taken(courier.obtain(), session.layout),
        common_of(session.layout) if instruction.work.personal_share else session.layout,
        first_step=0,
        num_steps=instruction.num_steps,
        round_=0,
        title=f"{workplace.site} alone",
    )
    report = LocalOnlyReport(
        site=workplace.site,
        score=session.score(),
        num_steps=result.num_steps,
        seconds=time.perf_counter() - started,
    )
    return report, None


def personalise(instruction: PersonaliseInstruction, envelope: Envelope, workplace: Workplace) -> Answer:
    """Make the site's own adapter: the state, with what the site keeps in its place, trained on the site's data alone.

    It is left in the state directory for the site to use; what the site keeps for the federation stays as it is.
    """
    started = time.perf_counter()
    session = open_session(instruction, workplace)
    courier = session.courier(instruction, envelope)
    state = courier.obtain()
    session.load(taken(state, session.layout))
    federated = session.score(without_personal)
    adapter, _ = courier.own(state, instruction.round)
    session.load(adapter)
    share = instruction.work.personal_share
    if instruction.num_steps:
        _, adapter = session.train(
            adapter,
            instruction.work.kept(session.layout) if share else session.layout,
            first_step=0,
            num_steps=instruction.num_steps,
            total_steps=instruction.num_steps,
            round_=instruction.round + 1,
            title=f"{workplace.site} for itself",
            share=share,
        )
    report = PersonaliseReport(
        site=workplace.site,
        federated=federated,
        personalised=session.score(share=share),
        num_steps=instruction.num_steps,
        seconds=time.perf_counter() - started,
    )
    session.export(adapter, share)
    return report, None
