"""The steps of FedProx and SCAFFOLD on a real model against plain loops that write the mathematics out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from client_app.training import DriftControl, StepControl, TailPenalty, TrainPlan, learning_rate_at, train
from fedllm import rng
from fedllm.model.build import attach_adapter, layout_of, only_trainable, read_adapter, write_adapter
from fedllm.model.initial import initial_arrays
from fedllm.model.spec import LoraSpec
from fedllm.update import Arrays
from tests.bases import load_tiny
from tests.text import example

TEXTS = [example(9 + 4 * index, index, first_target=1 + index) for index in range(3)]
PLAN = TrainPlan(
    steps=4,
    first_step=1,
    total_steps=6,
    batch_size=4,
    learning_rate=0.2,
    optimizer="sgd",
    warmup_fraction=0.3,
    max_grad_norm=0.5,
)
Extra = Callable[[list[torch.nn.Parameter]], torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("base")


def fresh(folder: Path) -> tuple[PeftModel, Arrays]:
    model = attach_adapter(load_tiny(folder), LoraSpec(rank=4))
    start = {name: value + np.float32(0.01) for name, value in initial_arrays(layout_of(model), 1).items()}
    write_adapter(model, layout_of(model), start)
    return model, start


def trained(folder: Path, plan: TrainPlan, drift: StepControl | None) -> Arrays:
    model, _ = fresh(folder)
    layout = layout_of(model)
    with only_trainable(model, layout) as parameters:
        if drift:
            drift.begin(parameters)
        train(model, iter([TEXTS] * plan.steps), plan, control=drift)
    return read_adapter(model, layout)


def loss_of(model: PeftModel) -> torch.Tensor:
    """Return the mean loss over all target tokens, one example at a time with full logits."""
    total = torch.zeros(())
    for text in TEXTS:
        ids = torch.from_numpy(text.input_ids.astype(np.int64))
        labels = torch.where(torch.from_numpy(text.target_mask), ids, -100)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        total = total + cross_entropy(logits[:-1], labels[1:], reduction="sum")
    return total / sum(text.num_targets for text in TEXTS)


def assert_close(found: Arrays, expected: Arrays, start: Arrays) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=3e-6)
        assert np.abs(value - start[name]).max() > 1e-4


@pytest.mark.parametrize("mu", [0.01, 5.0])
def test_fedprox_takes_the_gradient_of_the_written_objective(mu: float, folder: Path) -> None:
    """Autograd of ``loss + mu/2 |w - w_0|^2``, clipped and applied by hand."""
    found = trained(folder, PLAN, DriftControl(proximal=mu))
    model, start = fresh(folder)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    anchors = [parameter.detach().clone() for parameter in parameters]
    for step in range(PLAN.first_step, PLAN.first_step + PLAN.steps):
        model.zero_grad()
        distance = sum(((p - a) ** 2).sum() for p, a in zip(parameters, anchors, strict=True))
        (loss_of(model) + mu / 2 * distance).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, PLAN.max_grad_norm)
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.data -= learning_rate_at(step, PLAN) * parameter.grad
    assert_close(found, read_adapter(model, layout_of(model)), start)


@pytest.mark.parametrize(("first", "strength"), [(3, 0.1), (1, 4.0)])
def test_hetlora_takes_the_gradient_of_the_written_penalty(first: int, strength: float, folder: Path) -> None:
    """Autograd of ``loss + lambda sum |B[:, q:]| |A[q:]|``, clipped and applied by hand."""
    penalty = TailPenalty(first, strength)
    found = trained(folder, PLAN, penalty)
    model, start = fresh(folder)

    def tail_of(parameters: dict[str, torch.nn.Parameter]) -> torch.Tensor:
        downs = [name for name in parameters if ".lora_A." in name]
        pairs = [(parameters[name.replace("lora_A", "lora_B")], parameters[name]) for name in downs]
        assert pairs
        return torch.stack([b[:, first:].norm() * a[first:].norm() for b, a in pairs]).sum()

    with only_trainable(model, layout_of(model)) as parameters:
        before = tail_of(parameters).item()
        for step in range(PLAN.first_step, PLAN.first_step + PLAN.steps):
            model.zero_grad()
            (loss_of(model) + strength * tail_of(parameters)).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(list(parameters.values()), PLAN.max_grad_norm)
            for parameter in parameters.values():
                assert parameter.grad is not None
                parameter.data -= learning_rate_at(step, PLAN) * parameter.grad
        assert penalty.shrank == (tail_of(parameters).item() < before)
        assert_close(found, read_adapter(model, layout_of(model)), start)


def test_a_strong_penalty_shrinks_a_tail_and_one_of_zeros_gives_no_gradient_that_is_not_a_number(folder: Path) -> None:
    strong = TailPenalty(2, 10.0)
    trained(folder, PLAN, strong)
    assert strong.shrank
    model = attach_adapter(load_tiny(folder), LoraSpec(rank=4))  # B is zero, so its norm has no gradient
    layout = layout_of(model)
    with only_trainable(model, layout) as parameters:
        fresh_tail = TailPenalty(2, 10.0)
        fresh_tail.begin(parameters)
        train(model, iter([TEXTS] * PLAN.steps), PLAN, control=fresh_tail)
    assert not fresh_tail.shrank
    assert all(np.isfinite(value).all() for value in read_adapter(model, layout).values())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_without_mu_and_correction_every_bit_is_as_without_drift_control(optimizer: str, folder: Path) -> None:
    plan = dataclasses.replace(PLAN, optimizer=optimizer)  # type: ignore[arg-type]
    plain = trained(folder, plan, None)
    for name, value in trained(folder, plan, DriftControl()).items():
        np.testing.assert_array_equal(value, plain[name])


def test_a_stronger_pull_ends_nearer_to_the_start(folder: Path) -> None:
    _, start = fresh(folder)
    distances = []
    for mu in (0.0, 1.0, 4.0):
        ends = trained(folder, PLAN, DriftControl(proximal=mu))
        distances.append(sum(float(np.sum((ends[name] - start[name]) ** 2)) for name in start))
    assert distances[0] > distances[1] > distances[2] > 0


def correction_for(start: Arrays) -> Arrays:
    draw = rng.generator(4, purpose="correction")
    return {name: (0.02 * draw.standard_normal(value.shape)).astype(np.float32) for name, value in start.items()}


def test_scaffold_adds_the_correction_after_clipping(folder: Path) -> None:
    _, start = fresh(folder)
    correction = correction_for(start)
    found = trained(folder, PLAN, DriftControl(correction=correction))
    model, start = fresh(folder)
    with only_trainable(model, layout_of(model)) as parameters:
        for step in range(PLAN.first_step, PLAN.first_step + PLAN.steps):
            model.zero_grad()
            loss_of(model).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(list(parameters.values()), PLAN.max_grad_norm)
            for name, parameter in parameters.items():
                assert parameter.grad is not None
                parameter.data -= learning_rate_at(step, PLAN) * (parameter.grad + torch.from_numpy(correction[name]))
        assert_close(found, read_adapter(model, layout_of(model)), start)


def test_the_mean_gradient_is_the_papers_option_two(folder: Path) -> None:
    """``c_k - c + (w_0 - w) / sum of rates`` is the mean of the gradients, for SGD and any course of the rate."""
    _, start = fresh(folder)
    correction = correction_for(start)
    drift = DriftControl(correction=correction)
    end = trained(folder, PLAN, drift)
    rates = sum(learning_rate_at(step, PLAN) for step in range(PLAN.first_step, PLAN.first_step + PLAN.steps))
    for name, mean in drift.mean_gradients().items():
        option_two = (start[name].astype(np.float64) - end[name]) / rates - correction[name]
        np.testing.assert_allclose(mean, option_two, rtol=0, atol=5e-6)
        assert np.abs(mean).max() > 1e-4
