"""Exported adapters against PEFT's own loader."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from fedllm.errors import LayoutError, ModelError, NonFiniteError
from fedllm.model.build import (
    LoadedBase,
    adapter_target_modules,
    attach_adapter,
    layout_of,
    read_adapter,
    write_adapter,
)
from fedllm.model.export import load_peft_adapter, save_peft_adapter, served_as
from fedllm.model.prompts.tensors import imported
from fedllm.model.spec import LoraSpec, ModelSpec
from fedllm.rng import generator
from fedllm.update import Arrays, Layout, TensorSpec
from tests.bases import load_tiny, logits_of
from tests.soft_prompts import KINDS, NUM_TOKENS, with_prompt

IDS = [[5, 40, 200, 33, 7, 90, 12]]
SMALL = Layout((TensorSpec("a.lora_A.weight", (2, 3)), TensorSpec("a.lora_B.weight", (4, 2))))


def arrays_for(layout: Layout, seed: int = 1) -> Arrays:
    return {
        spec.name: generator(seed, purpose=spec.name).standard_normal(spec.shape, np.float32) * np.float32(0.1)
        for spec in layout.tensors
    }


def export(folder: Path, base: LoadedBase, adapter: LoraSpec) -> torch.Tensor:
    """Write random values into the model and into a folder; return the model's logits."""
    model = attach_adapter(base, adapter)
    layout = layout_of(model)
    arrays = arrays_for(layout)
    write_adapter(model, layout, arrays)
    save_peft_adapter(folder, layout, arrays, ModelSpec(adapter=adapter), adapter_target_modules(model), "tiny")
    return logits_of(model, IDS)


# Every other warning is an error. This one is PEFT's own: it asks transformers 5 for a property under its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize(
    "adapter",
    [
        LoraSpec(rank=4, alpha=8),
        LoraSpec(rank=4, alpha=2.5, rslora=True, dropout=0.1),
        LoraSpec(rank=3, target_modules="all-linear"),
    ],
)
def test_peft_loads_what_is_exported_and_computes_the_same(
    tmp_path: Path, quantization: str, adapter: LoraSpec
) -> None:
    expected = export(tmp_path / "adapter", load_tiny(tmp_path, quantization=quantization), adapter)
    fresh = load_tiny(tmp_path, quantization=quantization).model
    plain = logits_of(fresh, IDS)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(loaded, IDS), expected, rtol=0, atol=1e-6)
    assert (expected - plain).abs().max() > 1e-3, "the adapter does nothing"
    config = loaded.peft_config["default"]
    assert (config.lora_alpha, config.lora_dropout, config.r) == (adapter.alpha, adapter.dropout, adapter.rank)


def test_saved_values_are_read_back_exactly(tmp_path: Path) -> None:
    arrays = arrays_for(SMALL)
    save_peft_adapter(tmp_path / "adapter", SMALL, arrays, ModelSpec(), ["a"], "base")
    found = load_peft_adapter(tmp_path / "adapter")
    assert set(found) == set(arrays)
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == np.float32


def test_saving_again_replaces_both_files_and_leaves_no_others(tmp_path: Path) -> None:
    for seed in (1, 2):
        save_peft_adapter(tmp_path, SMALL, arrays_for(SMALL, seed), ModelSpec(), ["a"], "base")
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    np.testing.assert_array_equal(
        load_peft_adapter(tmp_path)["a.lora_A.weight"], arrays_for(SMALL, 2)["a.lora_A.weight"]
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 16, False)


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    spoilt = arrays_for(SMALL)
    spoilt["a.lora_A.weight"][0, 0] = np.inf
    with pytest.raises(NonFiniteError):
        save_peft_adapter(tmp_path / "adapter", SMALL, spoilt, ModelSpec(), ["a"], "base")
    with pytest.raises(LayoutError):
        save_peft_adapter(tmp_path / "adapter", SMALL, {}, ModelSpec(), ["a"], "base")
    assert not (tmp_path / "adapter").exists()


def test_a_folder_without_an_adapter_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"an adapter cannot be read.*adapter_model\.safetensors"):
        load_peft_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ModelError, match="an adapter cannot be read"):
        load_peft_adapter(tmp_path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_peft_loads_an_exported_soft_prompt_and_computes_the_same(tmp_path: Path, quantization: str, kind: str) -> None:
    model = with_prompt(load_tiny(tmp_path, quantization=quantization), KINDS[kind])
    layout, expected = layout_of(model), logits_of(model, IDS)
    spec = ModelSpec(adapter=KINDS[kind])
    save_peft_adapter(tmp_path / "adapter", layout, read_adapter(model, layout), spec, [], "tiny")
    fresh = load_tiny(tmp_path, quantization=quantization).model
    plain = logits_of(fresh, IDS)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(loaded, IDS), expected, rtol=0, atol=1e-5)
    assert (expected[:, -1] - plain[:, -1]).abs().max() > 1e-2, "the soft prompt does nothing"
    assert loaded.peft_config["default"].num_virtual_tokens == NUM_TOKENS


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_exported_soft_prompt_is_read_back_and_computes_the_same(tmp_path: Path, kind: str) -> None:
    model = with_prompt(load_tiny(tmp_path), KINDS[kind])
    layout, expected = layout_of(model), logits_of(model, IDS)
    save_peft_adapter(tmp_path, layout, read_adapter(model, layout), ModelSpec(adapter=KINDS[kind]), [], "tiny")
    again = attach_adapter(load_tiny(tmp_path), served_as(KINDS[kind]))
    write_adapter(again, layout_of(again), imported(load_peft_adapter(tmp_path), layout_of(again)))
    torch.testing.assert_close(logits_of(again, IDS), expected, rtol=0, atol=1e-5)
