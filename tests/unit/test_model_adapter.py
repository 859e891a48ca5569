"""Attaching an adapter to a base, and moving its values in and out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict

from fedllm.errors import LayoutError, ModelError, NonFiniteError
from fedllm.model.build import (
    LoadedBase,
    adapter_target_modules,
    attach_adapter,
    layout_of,
    read_adapter,
    write_adapter,
)
from fedllm.model.initial import initial_arrays
from fedllm.model.spec import LoraSpec
from fedllm.rng import generator
from fedllm.update import Arrays, Layout, TensorSpec
from tests.bases import load_tiny, logits_of

IDS = [[5, 40, 200, 33, 7, 90, 12]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(params=["nf4", "int8", "none"])
def base(request: pytest.FixtureRequest, folder: Path) -> LoadedBase:
    return load_tiny(folder, quantization=request.param)


@pytest.fixture
def nf4(folder: Path) -> LoadedBase:
    return load_tiny(folder)


def random_arrays(layout: Layout, seed: int) -> Arrays:
    return {
        spec.name: generator(seed, purpose=spec.name).standard_normal(spec.shape, np.float32) * np.float32(0.1)
        for spec in layout.tensors
    }


def test_a_new_adapter_leaves_the_base_as_it_is_and_alone_is_trainable(base: LoadedBase) -> None:
    before = logits_of(base.model, IDS)
    model = attach_adapter(base, LoraSpec(rank=4))
    assert torch.equal(logits_of(model, IDS), before)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.replace(".default", "") for name in trainable} == set(layout_of(model).names)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert not model.training


def test_the_layout_has_pefts_names_in_the_models_order(nf4: LoadedBase) -> None:
    model = attach_adapter(nf4, LoraSpec(rank=4))
    layout = layout_of(model)
    theirs = get_peft_model_state_dict(model)
    assert layout.names == tuple(theirs)
    assert {name: tuple(value.shape) for name, value in theirs.items()} == {
        spec.name: spec.shape for spec in layout.tensors
    }
    prefix = "base_model.model.model.layers.0.self_attn"
    assert layout.tensors[:4] == (
        TensorSpec(f"{prefix}.q_proj.lora_A.weight", (4, 64), "float32", "lora_A"),
        TensorSpec(f"{prefix}.q_proj.lora_B.weight", (64, 4), "float32", "lora_B"),
        TensorSpec(f"{prefix}.v_proj.lora_A.weight", (4, 64), "float32", "lora_A"),
        TensorSpec(f"{prefix}.v_proj.lora_B.weight", (32, 4), "float32", "lora_B"),
    )


def test_the_layout_is_float32_on_a_bfloat16_base(folder: Path) -> None:
    base = load_tiny(folder, compute_dtype="bfloat16")
    assert {spec.dtype for spec in layout_of(attach_adapter(base, LoraSpec(rank=2))).tensors} == {"float32"}


def test_what_is_written_is_read_back_as_copies(base: LoadedBase) -> None:
    model = attach_adapter(base, LoraSpec(rank=4))
    layout = layout_of(model)
    arrays = random_arrays(layout, 1)
    write_adapter(model, layout, arrays)
    found = read_adapter(model, layout)
    assert list(found) == list(layout.names)
    for name in layout.names:
        np.testing.assert_array_equal(found[name], arrays[name])
        found[name] += 1
    for name, value in read_adapter(model, layout).items():
        np.testing.assert_array_equal(value, arrays[name])


def test_a_write_that_is_refused_changes_nothing(nf4: LoadedBase) -> None:
    model = attach_adapter(nf4, LoraSpec(rank=4))
    layout = layout_of(model)
    arrays = random_arrays(layout, 1)
    write_adapter(model, layout, arrays)
    spoilt = random_arrays(layout, 2)
    spoilt[layout.names[-1]][0, 0] = np.nan
    with pytest.raises(NonFiniteError):
        write_adapter(model, layout, spoilt)
    short = {name: value for name, value in random_arrays(layout, 2).items() if name != layout.names[0]}
    with pytest.raises(LayoutError):
        write_adapter(model, layout, short)
    for name, value in read_adapter(model, layout).items():
        np.testing.assert_array_equal(value, arrays[name])


def test_a_layout_of_another_adapter_is_refused(nf4: LoadedBase) -> None:
    other = layout_of(attach_adapter(nf4, LoraSpec(rank=8)))
    model = attach_adapter(nf4, LoraSpec(rank=4))
    for use in (lambda: read_adapter(model, other), lambda: write_adapter(model, other, random_arrays(other, 1))):
        with pytest.raises(LayoutError, match="another layout"):
            use()


def test_another_spec_replaces_the_adapter_and_the_base_is_as_before(base: LoadedBase) -> None:
    before = logits_of(base.model, IDS)
    first = attach_adapter(base, LoraSpec(rank=4))
    write_adapter(first, layout_of(first), random_arrays(layout_of(first), 1))
    assert not torch.equal(logits_of(first, IDS), before)
    second = attach_adapter(base, LoraSpec(rank=2, target_modules="all-linear"))
    assert torch.equal(logits_of(second, IDS), before)
    assert {spec.shape[0] for spec in layout_of(second).tensors if spec.role == "lora_A"} == {2}
    third = attach_adapter(base, LoraSpec(rank=4))
    assert layout_of(third).digest == layout_of(attach_adapter(base, LoraSpec(rank=4))).digest
    assert torch.equal(logits_of(third, IDS), before)


def test_an_equal_spec_takes_the_same_adapter_again_with_first_values(nf4: LoadedBase) -> None:
    first = attach_adapter(nf4, LoraSpec(rank=4))
    layout = layout_of(first)
    write_adapter(first, layout, random_arrays(layout, 1))
    second = attach_adapter(nf4, LoraSpec(rank=4))
    assert second is first
    for name, value in read_adapter(second, layout).items():
        np.testing.assert_array_equal(value, initial_arrays(layout, 0)[name])


@pytest.mark.parametrize(("rslora", "scale"), [(False, 12.0 / 4), (True, 12.0 / math.sqrt(4))])
def test_the_scale_is_alpha_over_rank_or_its_root(folder: Path, rslora: bool, scale: float) -> None:
    """The oracle is a dense model with `scale * B A` added to its weights."""
    base = load_tiny(folder, quantization="none")
    spec = LoraSpec(rank=4, alpha=12.0, rslora=rslora, target_modules="up_proj")
    before = logits_of(base.model, IDS)
    model = attach_adapter(base, spec)
    arrays = random_arrays(layout_of(model), 3)
    write_adapter(model, layout_of(model), arrays)
    adapted = logits_of(model, IDS)
    oracle = load_tiny(folder, quantization="none").model
    for index in range(2):
        name = f"base_model.model.model.layers.{index}.mlp.up_proj"
        update = scale * arrays[f"{name}.lora_B.weight"] @ arrays[f"{name}.lora_A.weight"]
        weight = oracle.get_submodule(f"model.layers.{index}.mlp.up_proj").weight
        weight.data = weight.data + torch.from_numpy(update)
    torch.testing.assert_close(adapted, logits_of(oracle, IDS), rtol=1e-4, atol=1e-4)
    assert (adapted - before).abs().max() > 0.1


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("auto", ["q_proj", "v_proj"]),
        ("up_proj, down_proj", ["down_proj", "up_proj"]),
        ("all-linear", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
    ],
)
def test_target_modules_are_what_the_spec_says(nf4: LoadedBase, targets: str, expected: list[str]) -> None:
    model = attach_adapter(nf4, LoraSpec(rank=2, target_modules=targets))
    assert adapter_target_modules(model) == expected
    adapted = {spec.name.split(".lora_")[0].rpartition(".")[2] for spec in layout_of(model).tensors}
    assert adapted == set(expected)


@pytest.mark.parametrize("targets", ["q_proj,query", "proj", "lm_head", ","])
def test_unknown_target_modules_are_refused_with_those_that_exist(nf4: LoadedBase, targets: str) -> None:
    with pytest.raises(ModelError, match=r"expected some of down_proj, gate_proj, k_proj, o_proj, q_proj"):
        attach_adapter(nf4, LoraSpec(target_modules=targets))
    assert logits_of(attach_adapter(nf4, LoraSpec(rank=2)), IDS).isfinite().all()


def test_auto_needs_an_architecture_that_peft_knows(folder: Path) -> None:
    base = load_tiny(folder)
    base.model.config.model_type = "novel"
    with pytest.raises(ModelError, match=r"no default target modules for 'novel'.*all-linear"):
        attach_adapter(base, LoraSpec())
    assert len(layout_of(attach_adapter(base, LoraSpec(target_modules="all-linear"))).tensors) == 2 * 2 * 7


def test_dropout_acts_in_training_only(nf4: LoadedBase) -> None:
    model = attach_adapter(nf4, LoraSpec(rank=4, dropout=0.5))
    write_adapter(model, layout_of(model), random_arrays(layout_of(model), 1))
    model.train()
    one, two = (model(torch.tensor(IDS)).logits for _ in range(2))
    assert not torch.equal(one, two)
    assert torch.equal(logits_of(model, IDS), logits_of(model, IDS))


def test_gradient_checkpointing_gives_the_same_gradients(folder: Path) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        base = load_tiny(folder, gradient_checkpointing=checkpointing)
        model = attach_adapter(base, LoraSpec(rank=4))
        write_adapter(model, layout_of(model), random_arrays(layout_of(model), 1))
        model.train()
        assert model.get_base_model().model.is_activation_checkpointing is checkpointing
        model(torch.tensor(IDS), use_cache=False).logits.square().mean().backward()
        return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    assert set(plain) == set(recomputed)
    assert len(plain) == 8
    for name in plain:
        torch.testing.assert_close(plain[name], recomputed[name], rtol=1e-6, atol=1e-9)
