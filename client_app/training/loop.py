"""The training loop.

Gradients are those of the mean loss over all target tokens of a step, however they fall into micro-batches. The
optimizer's state does not outlive the call: each round starts from the server's adapter, to which old moments do not
belong.

Shape legend: T target tokens of a micro-batch, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from client_app.training.control import StepControl
from client_app.training.environment import build_optimizer, environment
from client_app.training.plan import StepReport, TrainPlan, TrainResult, learning_rate_at
from fedllm.data.sequences import Sequence
from fedllm.errors import CancelledError, DataError, TrainingError, explain
from fedllm.model.batch import collate, target_logits


def train(
    model: nn.Module,
    batches: Iterator[list[Sequence]],
    plan: TrainPlan,
    *,
    control: StepControl | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train the model's adapter in place.

    Whatever happens, the model is left in evaluation mode and without gradients. After an error its adapter holds the
    values of some step in between.

    Args:
        model: With its adapter attached; only parameters that require gradients change.
        batches: One micro-batch at a time.
        plan: What to do.
        control: What changes the gradients, None for nothing.
        on_step: Told about every step, for a progress bar.
        should_stop: Asked before every micro-batch whether to give up.

    Raises:
        ConfigError: The optimizer needs CUDA.
        DataError: There are too few batches, or a step has no target token.
        TrainingError: The loss or a gradient is not finite.
        CancelledError: `should_stop` said so.
    """
    start = time.perf_counter()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert parameters, "an adapter is attached before training"
    optimizer = build_optimizer(parameters, plan)
    reports: list[StepReport] = []
    try:
        model.train()
        with environment(parameters[0].device, plan):
            for step in range(plan.first_step, plan.first_step + plan.steps):
                reports.append(_step(model, parameters, optimizer, batches, plan, step, control, should_stop))
                if on_step:
                    on_step(reports[-1])
    finally:
        optimizer.zero_grad(set_to_none=True)
        model.eval()
    return _summary(reports, time.perf_counter() - start)


def _step(
    model: nn.Module,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    batches: Iterator[list[Sequence]],
    plan: TrainPlan,
    step: int,
    control: StepControl | None,
    should_stop: Callable[[], bool] | None,
) -> StepReport:
    rate = learning_rate_at(step, plan)
    micro_batches = _draw(batches, plan, step)
    num_targets = sum(sequence.num_targets for batch in micro_batches for sequence in batch)
    optimizer.zero_grad(set_to_none=True)
    loss = 0.0
    for sequences in micro_batches:
        if should_stop and should_stop():
            raise CancelledError(explain("training was stopped", where=f"step {step}"))
        loss += _accumulate(model, sequences, num_targets, plan)
    if control:
        control.pull()
    grad_norm = float(nn.utils.clip_grad_norm_(parameters, plan.max_grad_norm or math.inf))
    _check_finite(loss, grad_norm, rate, step)
    if control:
        control.correct(rate)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    num_tokens = sum(len(sequence) for batch in micro_batches for sequence in batch)
    return StepReport(step, loss, rate, grad_norm, num_targets, num_tokens)


def _draw(batches: Iterator[list[Sequence]], plan: TrainPlan, step: int) -> list[list[Sequence]]:
    """Take a step's micro-batches, those without targets left out."""
    drawn = list(itertools.islice(batches, plan.accumulation))
    assert all(len(batch) <= plan.batch_size for batch in drawn), "batches are drawn by the plan's batch size"
    useful = [batch for batch in drawn if any(sequence.num_targets for sequence in batch)]
    is_short = len(drawn) < plan.accumulation
    if is_short or not useful:
        problem = "there are too few batches" if is_short else "a step has no target token"
        raise DataError(explain(problem, where=f"step {step}", fix="Check the site's data: it may be cut too short."))
    return useful


def _accumulate(model: nn.Module, sequences: list[Sequence], num_targets: int, plan: TrainPlan) -> float:
    """Add a micro-batch's share of the step's gradient; return its share of the step's loss."""
    batch = collate(sequences, model)
    device = batch.input_ids.device.type
    with torch.autocast(device, torch.bfloat16, enabled=plan.compute_dtype == "bfloat16"):
        logits = target_logits(model, batch)  # [T, V]
    loss = cross_entropy(logits.float(), batch.targets, reduction="sum") / num_targets
    loss.backward()
    return float(loss.detach())


def _check_finite(loss: float, grad_norm: float, rate: float, step: int) -> None:
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise TrainingError(
            explain(
                "training diverged",
                expected="a finite loss and gradient",
                found=f"loss {loss}, gradient norm {grad_norm}",
                where=f"step {step} at learning rate {rate:.3g}",
                fix="Lower train.learning_rate, set train.max_grad_norm to 1, or lengthen train.warmup_fraction.",
            )
        )


def _summary(reports: list[StepReport], seconds: float) -> TrainResult:
    num_targets = sum(report.num_target_tokens for report in reports)
    return TrainResult(
        loss_first=reports[0].loss,
        loss_last=reports[-1].loss,
        loss_mean=math.fsum(report.loss * report.num_target_tokens for report in reports) / num_targets,
        num_steps=len(reports),
        num_target_tokens=num_targets,
        num_tokens=sum(report.num_tokens for report in reports),
        seconds=seconds,
        grad_norm_mean=math.fsum(report.grad_norm for report in reports) / len(reports),
        learning_rate_last=reports[-1].learning_rate,
    )
