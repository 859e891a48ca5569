"""Side factors and cuts on a real 4-bit model: same logits at every rank, and the same again through PEFT's own loader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from fedllm.lora.cut import narrow
from fedllm.model.build import LoadedBase, adapter_target_modules, attach_adapter, layout_of, only_trainable
from fedllm.model.export import load_peft_adapter, save_peft_adapter, served_as
from fedllm.model.fitted import FittedAdapter, fit_adapter
from fedllm.model.generate import without_adapter
from fedllm.model.spec import LoraSpec, ModelSpec
from fedllm.rng import generator
from fedllm.update import Arrays
from tests.bases import load_tiny, logits_of

IDS = [[5, 40, 200, 33, 7, 90, 12]]
ADAPTER = LoraSpec(rank=4, alpha=6, min_rank=1, side_rank=5, rslora=True)


@pytest.fixture
def base(tmp_path: Path) -> LoadedBase:
    return load_tiny(tmp_path)


def values_for(fitted: FittedAdapter) -> Arrays:
    return {
        spec.name: generator(1, purpose=spec.name).standard_normal(spec.shape, "float32") / 5
        for spec in fitted.layout.tensors
    }


def test_a_site_of_any_rank_and_alpha_computes_the_same(base: LoadedBase) -> None:
    whole = fit_adapter(base, ADAPTER)
    values = values_for(whole)
    plain = logits_of(whole.model, IDS)
    whole.write(values)
    expected = logits_of(whole.model, IDS)
    assert (expected - plain).abs().max() > 0.1
    for rank, alpha in ((1, 0.0), (3, 2.0), (4, 9.0), (2, 6.0)):
        site = fit_adapter(base, ADAPTER, rank, alpha)
        assert site.layout == whole.layout
        assert {spec.shape[0] for spec in site.own_layout.tensors if spec.role == "lora_A"} == {rank}
        site.write(values)
        torch.testing.assert_close(logits_of(site.model, IDS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 6.0), (2, 6.0), (3, 1.5), (4, 9.0)])
def test_what_a_site_trained_is_read_back_as_the_federation_s(base: LoadedBase, rank: int, alpha: float) -> None:
    """After a step in the site's own scale, the adapter that it reports computes what the site's model computes."""
    site = fit_adapter(base, ADAPTER, rank, alpha)
    values = values_for(site)
    site.write(values)
    with torch.no_grad():
        for name, parameter in site.model.named_parameters():
            if parameter.requires_grad:
                parameter += (
                    torch.from_numpy(generator(2, purpose=name).standard_normal(parameter.shape, "float32")) / 9
                )
    expected = logits_of(site.model, IDS)
    trained = site.read(values)
    assert all(np.array_equal(trained[name], values[name]) for name in trained if "side" in name)
    whole = fit_adapter(base, ADAPTER)
    whole.write(trained)
    torch.testing.assert_close(logits_of(whole.model, IDS), expected, rtol=1e-5, atol=2e-5)


def test_only_the_site_s_own_part_is_trainable_and_the_rest_is_float32(base: LoadedBase) -> None:
    site = fit_adapter(base, ADAPTER, 2)
    trainable = {name for name, value in site.model.named_parameters() if value.requires_grad}
    assert {name.replace(".default", "") for name in trainable} == set(site.own_layout.names)
    frozen = [value for name, value in site.model.named_parameters() if ".rest." in name]
    assert {value.dtype for value in frozen} == {torch.float32}
    assert {min(value.shape) for value in frozen} == {4 - 2 + 5}


def test_the_rest_stays_frozen_in_training_after_the_adapter_was_switched_off_and_on(base: LoadedBase) -> None:
    site = fit_adapter(base, ADAPTER, 2)
    with without_adapter(site.model):
        logits_of(site.model, IDS)
    with only_trainable(site.model, site.own_layout) as parameters:
        trainable = [value for value in site.model.parameters() if value.requires_grad]
        assert {id(value) for value in trainable} == {id(value) for value in parameters.values()}
        assert len(trainable) == len(site.own_layout.tensors)


def test_a_truncated_site_applies_its_own_components_only(base: LoadedBase) -> None:
    adapter = LoraSpec(rank=4, alpha=6, min_rank=1)
    site = fit_adapter(base, adapter, 2)
    values = values_for(site)
    site.write(values, truncated=True)
    found = logits_of(site.model, IDS)
    alone = fit_adapter(base, LoraSpec(rank=2, alpha=6))
    alone.write(
        {name: value / (2 if "lora_B" in name else 1) for name, value in narrow(values, site.layout, 2).items()}
    )
    torch.testing.assert_close(found, logits_of(alone.model, IDS), rtol=1e-5, atol=1e-5)


def test_another_run_on_the_same_base_gets_no_rest_of_the_one_before(base: LoadedBase) -> None:
    fit_adapter(base, ADAPTER).write(values_for(fit_adapter(base, ADAPTER)))
    plain = fit_adapter(base, LoraSpec(rank=4, alpha=6, rslora=True))
    assert not [name for name, _ in plain.model.named_parameters() if ".rest." in name]
    assert layout_of(plain.model) == plain.layout


# Every other warning is an error. This one is PEFT's own: it asks transformers 5 for a property under its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_loads_the_joined_adapter_and_computes_the_same(base: LoadedBase, tmp_path: Path) -> None:
    fitted = fit_adapter(base, ADAPTER)
    values = values_for(fitted)
    for name in fitted.layout.names:
        if "side_B" in name:
            values[name][:, 3:] = 0
    fitted.write(values)
    expected = logits_of(fitted.model, IDS)
    targets = adapter_target_modules(fitted.model)
    save_peft_adapter(tmp_path / "adapter", fitted.layout, values, ModelSpec(adapter=ADAPTER), targets, "tiny")
    loaded = PeftModel.from_pretrained(load_tiny(tmp_path).model, str(tmp_path / "adapter"))
    assert loaded.peft_config["default"].r == 4 + 3
    torch.testing.assert_close(logits_of(loaded, IDS), expected, rtol=1e-5, atol=1e-5)
    again = fit_adapter(base, served_as(ADAPTER, tmp_path / "adapter"))
    again.write(load_peft_adapter(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(again.model, IDS), expected, rtol=1e-5, atol=1e-5)
    assert attach_adapter(base, served_as(ADAPTER, tmp_path / "adapter")) is again.model
