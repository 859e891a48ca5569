"""Matrices between LoRA's factors, against the same product multiplied out: in NumPy, in the model, in PEFT's files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from fedllm import rng
from fedllm.config import read_run_config
from fedllm.errors import ConfigError
from fedllm.lora.heads import block_diagonal
from fedllm.model.adapter import only_trainable
from fedllm.model.build import LoadedBase, adapter_target_modules
from fedllm.model.export import load_peft_adapter, save_peft_adapter, served_as
from fedllm.model.fitted import FittedAdapter, fit_adapter
from fedllm.model.heads import gains_of
from fedllm.model.initial import initial_arrays
from fedllm.model.spec import LoraSpec, ModelSpec
from fedllm.update import Arrays, Contribution, Layout, TensorSpec
from strategies.aggregators import WeightedMean
from strategies.lowrank.first_step import FirstStep
from strategies.lowrank.mean import ProductMean
from strategies.lowrank.rules import Orthogonal
from strategies.registry import build_strategy
from strategies.slots import ArraySource, Origin
from tests.bases import load_tiny, logits_of

IDS = [[5, 40, 200, 33, 7, 90, 12]]
SEVERAL = LoraSpec(rank=6, alpha=9, num_heads=3)
ONE = LoraSpec(rank=4, alpha=6, num_heads=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    return load_tiny(tmp_path_factory.mktemp("base"))


def drawn(layout: Layout, size: float = 0.2) -> Arrays:
    return {
        spec.name: np.float32(size) * rng.generator(1, purpose=spec.name).standard_normal(spec.shape, np.float32)
        for spec in layout.tensors
    }


def trained(fitted: FittedAdapter) -> Arrays:
    values = drawn(fitted.layout)
    fitted.write(values)
    return values


@pytest.mark.parametrize("spec", [SEVERAL, ONE])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_model_computes_what_its_export_computes(spec: LoraSpec, base: LoadedBase, tmp_path: Path) -> None:
    fitted = fit_adapter(base, spec)
    values = trained(fitted)
    expected = logits_of(fitted.model, IDS)
    targets = adapter_target_modules(fitted.model)
    save_peft_adapter(tmp_path / "adapter", fitted.layout, values, ModelSpec(adapter=spec), targets, "tiny")
    loaded = PeftModel.from_pretrained(load_tiny(tmp_path).model, str(tmp_path / "adapter"))
    found = logits_of(loaded, IDS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with loaded.disable_adapter():
        assert (logits_of(loaded, IDS) - expected).abs().max() > 0.1
    again = fit_adapter(base, served_as(spec, tmp_path / "adapter"))
    again.write(load_peft_adapter(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(again.model, IDS), expected, rtol=1e-5, atol=1e-5)


def test_gains_are_trained_and_what_is_read_has_them_inside(base: LoadedBase) -> None:
    fitted = fit_adapter(base, SEVERAL)
    values = trained(fitted)
    part = fitted.layout.only([spec.name for spec in fitted.layout.tensors if spec.role == "head_M"])
    gains = gains_of(fitted.model)
    with only_trainable(fitted.model, part) as parameters:
        wanted = {id(parameter) for parameter in (*parameters.values(), *gains)}
        assert wanted == {id(value) for value in fitted.model.parameters() if value.requires_grad}
        fitted.model(input_ids=torch.tensor(IDS)).logits.square().mean().backward()
    assert len(gains) == len(part.tensors)
    for gain in gains:
        assert gain.grad is not None
        assert gain.grad.abs().min() > 0
        gain.data = torch.tensor([2.0, 0.5, -1.0])
    expected = logits_of(fitted.model, IDS)
    read = fitted.read(values)
    factor = np.array([2.0, 0.5, -1.0], np.float32)[:, None, None]
    for spec in fitted.layout.tensors:
        np.testing.assert_array_equal(read[spec.name], values[spec.name] * (factor if spec in part.tensors else 1))
    fitted.write(read)
    assert all(torch.equal(gain, torch.ones(3)) for gain in gains)
    torch.testing.assert_close(logits_of(fitted.model, IDS), expected, rtol=1e-5, atol=1e-5)


def test_heads_start_as_the_base_with_fixed_factors_near_orthonormal(base: LoadedBase) -> None:
    layout = Layout(
        (
            TensorSpec("x.lora_A.weight", (8, 4096), role="head_A"),
            TensorSpec("x.lora_M.weight", (2, 4, 4), role="head_M"),
            TensorSpec("x.lora_B.weight", (2048, 8), role="head_B"),
        )
    )
    arrays = initial_arrays(layout, 0)
    a, b = arrays["x.lora_A.weight"], arrays["x.lora_B.weight"]
    np.testing.assert_allclose(a @ a.T, np.eye(8), atol=0.1)
    np.testing.assert_allclose(b.T @ b, np.eye(8), atol=0.1)
    assert not arrays["x.lora_M.weight"].any()
    for spec in (SEVERAL, ONE):
        fitted = fit_adapter(base, spec)
        fitted.write(initial_arrays(fitted.layout, 0))
        after = logits_of(fitted.model, IDS)
        with fitted.model.disable_adapter():
            torch.testing.assert_close(logits_of(fitted.model, IDS), after, rtol=0, atol=0)


def test_the_first_step_is_the_best_approximation_of_the_mean_product() -> None:
    layout = Layout(
        (
            TensorSpec("x.lora_A.weight", (3, 17), role="lora_A"),
            TensorSpec("x.lora_M.weight", (1, 3, 3), role="lora_M"),
            TensorSpec("x.lora_B.weight", (12, 3), role="lora_B"),
        )
    )
    params, scale = initial_arrays(layout, 0), 2.0
    sent = layout.only(["x.lora_A.weight", "x.lora_B.weight"])
    updates = [
        {name: value + np.float32(index) * 0.1 for name, value in drawn(sent, 1.0 + index).items()}
        for index in range(3)
    ]
    aggregator = FirstStep(ProductMean(Orthogonal(), scale, 0), WeightedMean())
    aggregation = aggregator.start(sent, Origin(1, layout, params, params))
    ideal = np.zeros((12, 17))
    for number, update in enumerate(updates):
        aggregation.fold(ArraySource(update), Contribution(f"s{number}", number + 1.0, {}))
        b, a = (params[f"x.lora_{one}.weight"] + update[f"x.lora_{one}.weight"].astype(float) for one in "BA")
        ideal += (number + 1) / 6 * scale * b @ a
    delta, measured = aggregation.finish()
    a, m, b = ((params[name] + delta[name]).astype(float) for name in layout.names)
    u, s, v = np.linalg.svd(ideal)
    found = scale * b @ block_diagonal(m) @ a
    np.testing.assert_allclose(found, u[:, :3] * s[:3] @ v[:3], atol=1e-5 * s[0])
    np.testing.assert_allclose(b.T @ b, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(a @ a.T, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(scale * m[0], np.diag(s[:3]), atol=1e-5 * s[0])
    assert measured["discarded_energy"] == pytest.approx(np.sum(s[3:] ** 2) / np.sum(s**2), rel=1e-6)


def test_a_sum_over_heads_is_a_block_diagonal_matrix() -> None:
    draw = rng.generator(0, purpose="blocks")
    b, middle, a = draw.standard_normal((9, 6)), draw.standard_normal((3, 2, 2)), draw.standard_normal((6, 11))
    expected = sum(b[:, 2 * h : 2 * h + 2] @ middle[h] @ a[2 * h : 2 * h + 2] for h in range(3))
    np.testing.assert_allclose(b @ block_diagonal(middle) @ a, expected, atol=1e-12)


def test_what_travels_is_the_square_of_the_rank(base: LoadedBase) -> None:
    for name, spec in (("fed-sb", ONE), ("ravan", SEVERAL)):
        strategy = build_strategy(
            read_run_config({"strategy.name": name, "adapter.rank": spec.rank, "adapter.num_heads": spec.num_heads})
        )
        layout = fit_adapter(base, spec).layout
        num_layers = len(layout.tensors) // 3
        assert strategy.work.at(2).sent(layout).num_parameters == num_layers * spec.rank**2 // spec.num_heads


@pytest.mark.parametrize("settings", [{"adapter.num_heads": 1}, {"adapter.rank": 5}])
def test_heads_that_do_not_fit_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="heads do not fit"):
        build_strategy(read_run_config({"strategy.name": "ravan", **settings}))
