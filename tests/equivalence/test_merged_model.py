"""A merged model against the quantized base with its adapter beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from fedllm.cli.main import main
from fedllm.config import RunConfig
from fedllm.errors import ModelError
from fedllm.model.build import LoadedBase, adapter_target_modules
from fedllm.model.export import save_peft_adapter
from fedllm.model.fitted import FittedAdapter, fit_adapter
from fedllm.model.merge import save_merged
from fedllm.model.spec import AdapterConfig, BaseSpec, LoraSpec
from fedllm.rng import generator
from fedllm.runs import Manifest, RunFolder
from fedllm.update import Arrays, Layout, TensorSpec, zeros
from tests.bases import dense, load_tiny, logits_of

IDS = [[5, 40, 200, 33, 7, 90, 12]]
ADAPTER = LoraSpec(rank=4, alpha=6, side_rank=5, target_modules="all-linear")


def values_for(fitted: FittedAdapter, size: float = 0.2) -> Arrays:
    return {
        spec.name: generator(1, purpose=spec.name).standard_normal(spec.shape, "float32") * size
        for spec in fitted.layout.tensors
    }


def adapted(base: LoadedBase, size: float = 0.2) -> tuple[torch.Tensor, Layout, Arrays]:
    fitted = fit_adapter(base, ADAPTER)
    values = values_for(fitted, size)
    fitted.write(values)
    return logits_of(fitted.model, IDS), fitted.layout, values


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_a_merged_model_computes_what_base_and_adapter_compute(quantization: str, tied: bool, tmp_path: Path) -> None:
    base = load_tiny(tmp_path, quantization=quantization, tie_embeddings=tied)
    expected, layout, values = adapted(base)
    save_merged(tmp_path / "merged", base, ADAPTER, layout, values, "float32")
    found = logits_of(dense(tmp_path / "merged"), IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    words = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert words("a river").input_ids == base.tokenizer("a river").input_ids


def test_half_the_bytes_cost_half_the_digits(tmp_path: Path) -> None:
    base = load_tiny(tmp_path)
    expected, layout, values = adapted(base)
    sizes = {}
    for dtype, tolerance in (("float32", 1e-4), ("float16", 0.05), ("bfloat16", 0.4)):
        save_merged(tmp_path / dtype, base, ADAPTER, layout, values, dtype)  # type: ignore[arg-type]
        assert (logits_of(dense(tmp_path / dtype), IDS) - expected).abs().max() < tolerance
        sizes[dtype] = (tmp_path / dtype / "model.safetensors").stat().st_size
    assert 0.45 < sizes["bfloat16"] / sizes["float32"] < 0.55
    assert (expected - logits_of(load_tiny(tmp_path).model, IDS)).abs().max() > 1


# Every other warning is an error. These are PEFT's own: an old name of a property, and that merging rounds.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear:UserWarning")
def test_merging_into_4_bit_weights_loses_what_merging_into_dense_ones_keeps(tmp_path: Path) -> None:
    base = load_tiny(tmp_path)
    plain = logits_of(base.model, IDS)
    expected, layout, values = adapted(base, size=0.02)
    targets = adapter_target_modules(fit_adapter(base, ADAPTER).model)
    run = RunConfig(adapter=AdapterConfig(rank=4, alpha=6, side_rank=5, target_modules="all-linear"))
    save_peft_adapter(tmp_path / "adapter", layout, values, run.spec, targets, "tiny")
    save_merged(tmp_path / "merged", base, ADAPTER, layout, values, "float32")
    ours = logits_of(dense(tmp_path / "merged"), IDS)
    theirs = logits_of(
        PeftModel.from_pretrained(load_tiny(tmp_path).model, str(tmp_path / "adapter")).merge_and_unload(), IDS
    )
    change = (expected - plain).norm()
    assert (ours - expected).norm() < 0.01 * change
    assert (theirs - expected).norm() > 0.5 * change


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    name = "base_model.model.elsewhere.q_proj.lora_{}.weight"
    layout = Layout(
        (TensorSpec(name.format("A"), (4, 64), role="lora_A"), TensorSpec(name.format("B"), (64, 4), role="lora_B"))
    )
    with pytest.raises(ModelError, match=r"another model.*found elsewhere\.q_proj"):
        save_merged(tmp_path / "merged", load_tiny(tmp_path), LoraSpec(rank=4), layout, zeros(layout))
    assert not (tmp_path / "merged").exists()


def test_the_command_merges_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    base = load_tiny(tmp_path)
    expected, layout, values = adapted(base)
    adapter = AdapterConfig(rank=4, alpha=6, side_rank=5, target_modules="all-linear")
    config = RunConfig(model=BaseSpec(source=f"path:{tmp_path / 'tiny'}"), adapter=adapter)
    folder = RunFolder.create(tmp_path, "run")
    Manifest.of("run", config, base_fingerprint=base.fingerprint).write(folder.manifest)
    targets = adapter_target_modules(fit_adapter(base, ADAPTER).model)
    save_peft_adapter(folder.adapter, layout, values, config.spec, targets, "tiny")
    arguments = ["merge", str(tmp_path / "merged"), "--home", str(tmp_path), "--dtype", "float32"]
    assert main(arguments) == 0
    torch.testing.assert_close(logits_of(dense(tmp_path / "merged"), IDS), expected, rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    assert main(arguments) == 2
    assert "Name a new or empty folder" in capsys.readouterr().err
