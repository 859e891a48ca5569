"""Local training: what changes, what is reported, what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from client_app.training import StepReport, TrainPlan, TrainResult, train
from fedllm.data.sequences import Sequence
from fedllm.errors import CancelledError, ConfigError, DataError, TrainingError
from fedllm.model.build import attach_adapter, layout_of, only_trainable, read_adapter, write_adapter
from fedllm.model.evaluate import evaluate_loss
from fedllm.model.initial import initial_arrays
from fedllm.model.spec import LoraSpec
from fedllm.update import Arrays
from tests.bases import load_tiny, smollm
from tests.text import example, packed

TEXT = [example(8 + 3 * index, index, first_target=1 + 2 * index) for index in range(6)]
PLAN = TrainPlan(steps=1, first_step=0, total_steps=1, batch_size=8, learning_rate=1.0, optimizer="sgd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def fresh(folder: Path, adapter: LoraSpec | None = None, **settings: Any) -> PeftModel:
    """Return the tiny model with an adapter whose two factors are both away from zero."""
    model = attach_adapter(load_tiny(folder, **settings), adapter or LoraSpec(rank=4))
    layout = layout_of(model)
    write_adapter(model, layout, {name: value + 0.01 for name, value in initial_arrays(layout, 1).items()})
    return model


def values(model: PeftModel) -> Arrays:
    return read_adapter(model, layout_of(model))


def change(model: PeftModel, batches: list[list[Sequence]], plan: TrainPlan) -> tuple[Arrays, TrainResult]:
    """Train and return `trained - received`."""
    before = values(model)
    result = train(model, iter(batches), plan)
    return {name: value - before[name] for name, value in values(model).items()}, result


def assert_close(found: Arrays, expected: Arrays, tolerance: float) -> None:
    scale = max(np.abs(value).max() for value in expected.values())
    assert scale > 0
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance * scale)


def digest(arrays: Arrays) -> str:
    return hashlib.sha256(b"".join(value.tobytes() for value in arrays.values())).hexdigest()


def for_ever(sequences: list[Sequence], size: int) -> Iterator[list[Sequence]]:
    stream = itertools.cycle(sequences)
    while True:
        yield list(itertools.islice(stream, size))


def with_(plan: TrainPlan, **changes: Any) -> TrainPlan:
    return dataclasses.replace(plan, **changes)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("role", ["lora_A", "lora_B"])
def test_a_factor_that_is_not_trained_keeps_every_bit(role: str, optimizer: str, folder: Path) -> None:
    model = fresh(folder)
    layout = layout_of(model)
    part = layout.only([spec.name for spec in layout.tensors if spec.role == role])
    plan = with_(PLAN, steps=2, total_steps=2, optimizer=optimizer, weight_decay=0.1)
    with only_trainable(model, part):
        moved, _ = change(model, [TEXT, TEXT], plan)
    for spec in layout.tensors:
        assert bool(moved[spec.name].any()) == (spec.role == role)
    moved, _ = change(model, [TEXT, TEXT], plan)
    assert all(delta.any() for delta in moved.values()), "all are trainable again"


def test_accumulated_micro_batches_have_the_gradient_of_one_batch(folder: Path) -> None:
    """The micro-batches hold very different numbers of targets, so a mean of means would be another gradient."""
    four = TEXT[:4]
    whole, result = change(fresh(folder), [four], PLAN)
    split, accumulated = change(fresh(folder), [four[:2], four[2:]], with_(PLAN, accumulation=2))
    assert_close(split, whole, 1e-6)
    assert accumulated.loss_first == pytest.approx(result.loss_first, rel=1e-6)
    assert accumulated.num_target_tokens == result.num_target_tokens == sum(text.num_targets for text in four)


def test_packed_examples_have_the_gradient_of_separate_ones(folder: Path) -> None:
    separate, _ = change(fresh(folder), [TEXT[:4]], PLAN)
    together, _ = change(fresh(folder), [[packed(*TEXT[:2]), packed(*TEXT[2:4])]], PLAN)
    assert_close(together, separate, 1e-6)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_training_lowers_the_loss_and_leaves_the_base_alone(folder: Path, quantization: str) -> None:
    base = load_tiny(folder, quantization=quantization)
    model = attach_adapter(base, LoraSpec(rank=8, target_modules="all-linear"))
    frozen = {name: value for name, value in model.named_parameters() if not value.requires_grad}
    before = {name: value.detach().clone() for name, value in frozen.items()}
    plan = with_(PLAN, steps=30, total_steps=30, optimizer="adamw", learning_rate=1e-2, batch_size=3)
    start = evaluate_loss(model, TEXT, 8).loss
    result = train(model, for_ever(TEXT, 3), plan)
    assert evaluate_loss(model, TEXT, 8).loss < start - 1
    assert result.loss_last < result.loss_first - 1
    assert all(torch.equal(before[name], value) for name, value in frozen.items())


def test_the_model_is_left_in_evaluation_mode_without_gradients(folder: Path) -> None:
    model = fresh(folder)
    train(model, iter([TEXT]), PLAN)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_clipping_bounds_the_gradient_and_the_report_tells_its_norm(folder: Path) -> None:
    free, plain = change(fresh(folder), [TEXT], PLAN)
    norm = math.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in free.values()))
    assert plain.grad_norm_mean == pytest.approx(norm, rel=1e-4)
    bound = norm / 4
    clipped, result = change(fresh(folder), [TEXT], with_(PLAN, max_grad_norm=bound))
    assert result.grad_norm_mean == pytest.approx(norm, rel=1e-4)
    assert_close(clipped, {name: value / 4 for name, value in free.items()}, 1e-4)
    loose, _ = change(fresh(folder), [TEXT], with_(PLAN, max_grad_norm=norm * 2))
    assert_close(loose, free, 1e-6)


def test_two_rounds_take_the_rates_of_one_long_one(folder: Path) -> None:
    plan = with_(PLAN, total_steps=4, steps=4, warmup_fraction=0.5, learning_rate=0.1, batch_size=2)
    batches = [TEXT[:2], TEXT[2:4], TEXT[4:], TEXT[:2]]
    long = fresh(folder)
    whole = train(long, iter(batches), plan)
    short = fresh(folder)
    train(short, iter(batches[:2]), with_(plan, steps=2))
    rest = train(short, iter(batches[2:]), with_(plan, steps=2, first_step=2))
    assert digest(values(short)) == digest(values(long))
    assert rest.learning_rate_last == whole.learning_rate_last < 0.1


def test_every_step_is_reported_and_the_result_sums_them_up(folder: Path) -> None:
    reports: list[StepReport] = []
    plan = with_(PLAN, steps=3, first_step=5, total_steps=10, learning_rate=0.1, batch_size=2)
    batches = [TEXT[:2], TEXT[2:4], TEXT[4:]]
    result = train(fresh(folder), iter(batches), plan, on_step=reports.append)
    assert [report.step for report in reports] == [5, 6, 7]
    assert [report.num_target_tokens for report in reports] == [sum(s.num_targets for s in batch) for batch in batches]
    assert [report.num_tokens for report in reports] == [sum(map(len, batch)) for batch in batches]
    weighted = sum(report.loss * report.num_target_tokens for report in reports)
    assert result.loss_mean == pytest.approx(weighted / result.num_target_tokens)
    assert (result.loss_first, result.loss_last) == (reports[0].loss, reports[2].loss)
    assert (result.num_steps, result.num_tokens) == (3, sum(map(len, TEXT)))
    assert result.grad_norm_mean == pytest.approx(sum(report.grad_norm for report in reports) / 3)
    assert result.learning_rate_last == reports[2].learning_rate
    assert result.seconds > 0


def test_the_first_loss_is_that_of_the_evaluation(folder: Path) -> None:
    model = fresh(folder)
    expected = evaluate_loss(model, TEXT, 8).loss
    assert train(model, iter([TEXT]), PLAN).loss_first == pytest.approx(expected, rel=1e-6)


def test_a_loss_that_is_not_finite_ends_training_with_advice(folder: Path) -> None:
    model = fresh(folder)
    plan = with_(PLAN, steps=50, first_step=7, total_steps=100, learning_rate=1e6)
    with pytest.raises(TrainingError, match=r"in step \d+ at learning rate \d.*e\+05.*Lower train\.learning_rate"):
        train(model, for_ever(TEXT, 6), plan)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_stop_is_obeyed_before_the_next_micro_batch(folder: Path) -> None:
    model, asked = fresh(folder), itertools.count(1)
    before = digest(values(model))
    plan = with_(PLAN, steps=3, total_steps=3, accumulation=2, batch_size=2)
    with pytest.raises(CancelledError, match="step 0"):
        train(model, for_ever(TEXT, 2), plan, should_stop=lambda: next(asked) >= 2)
    assert next(asked) == 3, "it was asked twice"
    assert digest(values(model)) == before
    assert not model.training


def test_too_few_batches_or_targets_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="too few batches"):
        train(fresh(folder), iter([]), PLAN)
    with pytest.raises(DataError, match="too few batches"):
        train(fresh(folder), iter([TEXT]), with_(PLAN, accumulation=2))
    with pytest.raises(DataError, match="no target token"):
        train(fresh(folder), iter([[example(4, 1, first_target=9)]]), PLAN)


def test_a_micro_batch_without_targets_changes_nothing(folder: Path) -> None:
    alone, _ = change(fresh(folder), [TEXT], PLAN)
    with_empty, _ = change(fresh(folder), [[example(4, 1, first_target=9)], TEXT], with_(PLAN, accumulation=2))
    assert_close(with_empty, alone, 1e-6)


@pytest.mark.parametrize("optimizer", ["adamw-8bit", "adamw-paged"])
def test_bitsandbytes_optimizers_are_refused_without_cuda(folder: Path, optimizer: str) -> None:
    with pytest.raises(ConfigError, match=f"{optimizer}.*needs CUDA.*Use 'adamw'"):
        train(fresh(folder), iter([TEXT]), with_(PLAN, optimizer=optimizer))


@pytest.mark.parametrize(("first", "steps"), [(0, 11), (8, 3), (-1, 1)])
def test_steps_outside_the_schedule_are_refused(first: int, steps: int) -> None:
    with pytest.raises(ConfigError, match=r"outside the federation's steps; expected steps within 0\.\.9"):
        with_(PLAN, first_step=first, steps=steps, total_steps=10)


def test_bfloat16_computes_nearly_the_same_and_keeps_the_adapter_in_float32(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    full, _ = change(fresh(folder), [TEXT], PLAN)
    model = fresh(folder, compute_dtype="bfloat16")
    half, _ = change(model, [TEXT], with_(PLAN, compute_dtype="bfloat16"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    flat_full, flat_half = (np.concatenate([value.ravel() for value in x.values()]) for x in (full, half))
    cosine = flat_full @ flat_half / (np.linalg.norm(flat_full) * np.linalg.norm(flat_half))
    assert 0.98 < cosine < 1 - 1e-7
    assert "'float32' is many times faster" in caplog.text


DROPOUT = LoraSpec(rank=4, dropout=0.3)
SEEDED = TrainPlan(
    steps=4, first_step=0, total_steps=4, batch_size=3, learning_rate=1e-2, warmup_fraction=0.3, num_threads=1, seed=11
)


def trained_digest(folder: Path, seed: int) -> str:
    model = fresh(folder, DROPOUT)
    train(model, for_ever(TEXT, 3), with_(SEEDED, seed=seed))
    return digest(values(model))


def test_equal_seeds_give_equal_bits_in_two_processes(folder: Path) -> None:
    here = trained_digest(folder, 11)
    torch.rand(3)  # the state of the process's own generator does not matter
    assert trained_digest(folder, 11) == here
    assert trained_digest(folder, 12) != here, "dropout does not follow the seed"
    script = "import sys; from pathlib import Path; from tests.unit.test_training_loop import trained_digest as f\n"
    command = [sys.executable, "-c", f"{script}print(f(Path(sys.argv[1]), 11))", str(folder)]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    assert there == here


def test_torchs_settings_are_put_back(folder: Path) -> None:
    def settings() -> tuple[object, ...]:
        filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        state = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        return torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), filled, state

    model = fresh(folder)
    torch.set_num_threads(2)
    before, during = settings(), []
    train(model, iter([TEXT]), with_(PLAN, num_threads=1), on_step=lambda _: during.append(settings()))
    assert during[0][:3] == (1, True, False)
    assert settings() == before
    with pytest.raises(DataError):
        train(model, iter([]), with_(PLAN, num_threads=1))
    assert settings() == before


def test_the_real_model_learns_from_two_steps() -> None:
    model = attach_adapter(smollm(), LoraSpec(rank=4))
    texts = [example(24, 1, vocabulary=40_000), example(24, 2, vocabulary=40_000)]
    plan = TrainPlan(steps=2, first_step=0, total_steps=2, batch_size=2, learning_rate=1e-2, schedule="constant")
    before = evaluate_loss(model, texts, 2).loss
    result = train(model, for_ever(texts, 2), plan)
    assert result.loss_first == pytest.approx(before, rel=1e-4)
    assert evaluate_loss(model, texts, 2).loss < result.loss_last < before
