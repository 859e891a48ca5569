"""Schedules against torch and transformers, and the loop against a plain one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from client_app.training import TrainPlan, learning_rate_at, train
from fedllm.model.build import attach_adapter, layout_of, read_adapter, write_adapter
from fedllm.model.initial import initial_arrays
from fedllm.model.quantize import linear_names
from fedllm.model.spec import LoraSpec
from tests.bases import dense, load_tiny
from tests.text import example

Schedule = Literal["cosine", "linear", "constant"]
TOTAL = 40
PEAK = 3e-3


def rates(schedule: Schedule, warmup_fraction: float = 0.0) -> list[float]:
    plan = TrainPlan(
        steps=TOTAL,
        first_step=0,
        total_steps=TOTAL,
        batch_size=1,
        learning_rate=PEAK,
        schedule=schedule,
        warmup_fraction=warmup_fraction,
    )
    return [learning_rate_at(step, plan) for step in range(TOTAL)]


def rates_of(scheduler: LRScheduler) -> list[float]:
    found = []
    for _ in range(TOTAL):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], PEAK)


def test_without_warm_up_the_schedules_are_torchs() -> None:
    cosine = CosineAnnealingLR(optimizer(), T_max=TOTAL)
    linear = LinearLR(optimizer(), start_factor=1.0, end_factor=0.0, total_iters=TOTAL)
    np.testing.assert_allclose(rates("cosine"), rates_of(cosine), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(rates("linear"), rates_of(linear), rtol=1e-9, atol=1e-15)
    assert rates("constant") == [PEAK] * TOTAL


def test_after_the_warm_up_the_schedules_are_transformers() -> None:
    warmup = 8
    theirs = {
        "cosine": rates_of(get_cosine_schedule_with_warmup(optimizer(), warmup, TOTAL)),
        "linear": rates_of(get_linear_schedule_with_warmup(optimizer(), warmup, TOTAL)),
    }
    schedules: tuple[Schedule, ...] = ("cosine", "linear")
    for schedule in schedules:
        ours = rates(schedule, warmup / TOTAL)
        np.testing.assert_allclose(ours[warmup:], theirs[schedule][warmup:], rtol=1e-9, atol=1e-15)
        # theirs wastes its first step on a rate of zero; ours is one step ahead
        np.testing.assert_allclose(ours[: warmup - 1], theirs[schedule][1:warmup], rtol=1e-9)


def test_a_fraction_that_is_a_whole_number_of_steps_is_not_rounded_up() -> None:
    plan = TrainPlan(100, 0, 100, 1, PEAK, warmup_fraction=0.07)
    assert [step for step in range(100) if learning_rate_at(step, plan) == PEAK] == [6, 7]


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.99])
def test_the_warm_up_rises_in_equal_steps_to_the_peak(fraction: float) -> None:
    found = rates("constant", fraction)
    warmup = math.ceil(fraction * TOTAL)
    np.testing.assert_allclose(found[:warmup], PEAK * np.arange(1, warmup + 1) / warmup)
    assert found[warmup:] == [PEAK] * (TOTAL - warmup)
    assert all(0 < rate <= PEAK for rate in rates("cosine", fraction))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_loop_does_what_a_plain_loop_does(tmp_path: Path, quantization: str) -> None:
    """The plain loop runs one example at a time with full logits, and torch's AdamW, scheduler and clipping."""
    texts = [example(9 + 4 * index, index, first_target=1 + index) for index in range(4)]
    plan = TrainPlan(
        steps=3,
        first_step=0,
        total_steps=6,
        batch_size=2,
        accumulation=2,
        learning_rate=PEAK,
        weight_decay=0.1,
        max_grad_norm=0.5,
    )
    model = attach_adapter(load_tiny(tmp_path, quantization=quantization), LoraSpec(rank=4))
    layout = layout_of(model)
    start = initial_arrays(layout, 5)
    write_adapter(model, layout, start)
    losses: list[float] = []
    train(model, iter([texts[:2], texts[2:]] * 3), plan, on_step=lambda report: losses.append(report.loss))
    found = read_adapter(model, layout)

    write_adapter(model, layout, start)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(parameters, PEAK, weight_decay=0.1)
    scheduler = CosineAnnealingLR(adamw, T_max=6)
    num_targets = sum(text.num_targets for text in texts)
    model.train()
    for step in range(3):
        total = torch.zeros(())
        for text in texts:
            ids = torch.from_numpy(text.input_ids.astype(np.int64))
            labels = torch.where(torch.from_numpy(text.target_mask), ids, -100)
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            total = total + cross_entropy(logits[:-1], labels[1:], reduction="sum") / num_targets
        total.backward()
        assert losses[step] == pytest.approx(float(total.detach()), rel=1e-5)
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        adamw.step()
        scheduler.step()
        adamw.zero_grad()
    for name, value in read_adapter(model, layout).items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-6)
        assert np.abs(value - start[name]).max() > 1e-4


def test_the_gradient_through_int8_is_that_of_the_dequantized_weights(tmp_path: Path) -> None:
    """The oracle is a dense model that holds the rounded weights, differentiated by torch."""
    quantized = load_tiny(tmp_path, quantization="int8").model
    plain = dense(tmp_path / "tiny")
    for name in linear_names(plain):
        layer = quantized.get_submodule(name)
        plain.get_submodule(name).weight.data = layer.weight.data * (layer.weight.SCB / 127)[:, None]
    gradients = []
    for model in (quantized, plain):
        embedded = model.get_input_embeddings()(torch.tensor([[5, 9, 100, 7, 33]])).detach().requires_grad_()
        model(inputs_embeds=embedded, use_cache=False).logits.square().mean().backward()
        gradients.append(embedded.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
