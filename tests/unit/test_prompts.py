"""Soft prompts on a base: attaching them, their tensors, and where they start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict

from fedllm.config import read_run_config
from fedllm.errors import ConfigError, LayoutError, ModelError
from fedllm.model.batch import collate, target_logits
from fedllm.model.build import LoadedBase, attach_adapter, first_values, layout_of, read_adapter, write_adapter
from fedllm.model.generate import answer, without_adapter
from fedllm.model.initial import PREFIX_DEVIATION, can_be_drawn
from fedllm.model.prompts.attach import NUM_FREQUENT, initial_ids, without_personal
from fedllm.model.prompts.tensors import EXPORTED, exported, imported
from fedllm.model.spec import LoraSpec, PrefixSpec, PromptSpec, SoftPromptSpec
from fedllm.update import TensorSpec, check_arrays, taken
from fedllm.work import ClientWork, common_of
from tests.bases import load_tiny, logits_of, smollm
from tests.soft_prompts import KINDS, NUM_TOKENS, random_arrays, with_prompt
from tests.text import example

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


@pytest.fixture(params=sorted(KINDS))
def adapter(request: pytest.FixtureRequest) -> SoftPromptSpec:
    return KINDS[request.param]


def test_the_tensors_are_what_each_kind_trains(nf4: LoadedBase) -> None:
    layouts = {kind: layout_of(attach_adapter(nf4, adapter)).tensors for kind, adapter in KINDS.items()}
    assert layouts["prompt"] == (TensorSpec("prompt_embeddings", (NUM_TOKENS, 64), "float32", "prompt"),)
    # two heads of keys of width 16, and as many values
    assert layouts["prefix"] == (
        TensorSpec("prefix.0", (NUM_TOKENS, 64), "float32", "prefix"),
        TensorSpec("prefix.1", (NUM_TOKENS, 64), "float32", "prefix"),
    )
    assert layouts["ptuning"] == (
        TensorSpec("prompt_encoder.embedding.weight", (NUM_TOKENS, 64), "float32", "encoder_input"),
        TensorSpec("prompt_encoder.mlp_head.0.weight", (24, 64), "float32", "encoder"),
        TensorSpec("prompt_encoder.mlp_head.0.bias", (24,), "float32", "encoder"),
        TensorSpec("prompt_encoder.mlp_head.2.weight", (24, 24), "float32", "encoder"),
        TensorSpec("prompt_encoder.mlp_head.2.bias", (24,), "float32", "encoder"),
        TensorSpec("prompt_encoder.mlp_head.4.weight", (64, 24), "float32", "encoder"),
        TensorSpec("prompt_encoder.mlp_head.4.bias", (64,), "float32", "encoder"),
    )


def test_the_soft_prompt_alone_is_trainable_and_in_float32(base: LoadedBase, adapter: SoftPromptSpec) -> None:
    model = attach_adapter(base, adapter)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(parameter.numel() for parameter in trainable.values()) == layout_of(model).num_parameters
    assert all(name.startswith("prompt_encoder.") for name in trainable)
    assert {parameter.dtype for parameter in trainable.values()} == {torch.float32}
    assert not model.training


def test_what_is_trained_is_float32_on_a_bfloat16_base_too(folder: Path, adapter: SoftPromptSpec) -> None:
    model = attach_adapter(load_tiny(folder, compute_dtype="bfloat16"), adapter)
    assert {spec.dtype for spec in layout_of(model).tensors} == {"float32"}


def test_what_is_written_is_read_back_and_changes_the_model(base: LoadedBase, adapter: SoftPromptSpec) -> None:
    model = attach_adapter(base, adapter)
    layout, before = layout_of(model), logits_of(model, IDS)
    arrays = random_arrays(layout)
    write_adapter(model, layout, arrays)
    found = read_adapter(model, layout)
    assert list(found) == list(layout.names)
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[name], value)
    assert (logits_of(model, IDS) - before).abs().max() > 1e-2


def test_without_it_the_model_is_the_base_bit_for_bit(base: LoadedBase, adapter: SoftPromptSpec) -> None:
    before, plain = logits_of(base.model, IDS), base.model.forward
    model = with_prompt(base, adapter)
    with without_adapter(model):
        assert torch.equal(logits_of(model, IDS), before)
    assert not torch.equal(logits_of(model, IDS)[:, -1], before[:, -1])
    assert base.model.forward == plain


def test_adapters_of_all_kinds_can_follow_each_other_on_a_base(nf4: LoadedBase) -> None:
    before = logits_of(nf4.model, IDS)
    for spec in [*KINDS.values(), LoraSpec(rank=2), *reversed(KINDS.values())]:
        model = attach_adapter(nf4, spec)
        layout = layout_of(model)
        write_adapter(model, layout, random_arrays(layout))
        answer(model, nf4.tokenizer, "Hi", 2)
    attach_adapter(nf4, LoraSpec(rank=2))
    assert torch.equal(logits_of(nf4.model, IDS), before)


def test_what_peft_would_save_is_what_is_exported(nf4: LoadedBase, adapter: SoftPromptSpec) -> None:
    model = with_prompt(nf4, adapter)
    layout = layout_of(model)
    theirs = get_peft_model_state_dict(model)
    assert list(theirs) == [EXPORTED]
    np.testing.assert_allclose(
        exported(read_adapter(model, layout), layout), theirs[EXPORTED].numpy(), rtol=1e-5, atol=1e-6
    )


def test_an_exported_prefix_is_taken_apart_again_and_one_of_another_size_is_refused(nf4: LoadedBase) -> None:
    layout = layout_of(attach_adapter(nf4, KINDS["prefix"]))
    arrays = random_arrays(layout)
    whole = exported(arrays, layout)
    for name, value in imported({EXPORTED: whole}, layout).items():
        np.testing.assert_array_equal(value, arrays[name])
    with pytest.raises(LayoutError, match="width 128"):
        imported({EXPORTED: whole[:, 1:]}, layout)


def test_first_values_fit_and_depend_on_the_seed_alone(base: LoadedBase, adapter: SoftPromptSpec) -> None:
    layout = layout_of(attach_adapter(base, adapter))
    first, again, other = (first_values(base, adapter, layout, seed) for seed in (7, 7, 8))
    check_arrays(first, layout, "test")
    for name in layout.names:
        np.testing.assert_array_equal(first[name], again[name])
        assert not first[name].any() or not np.array_equal(first[name], other[name])
    assert can_be_drawn(layout) == (adapter.kind != "prompt")


def test_a_prompt_starts_from_rows_of_the_vocabulary_whatever_the_quantization(folder: Path) -> None:
    adapter = PromptSpec(num_virtual_tokens=50)
    firsts = []
    for quantization in ("nf4", "int8", "none"):
        base = load_tiny(folder, quantization=quantization)
        layout = layout_of(attach_adapter(base, adapter))
        firsts.append(first_values(base, adapter, layout, 7)[EXPORTED])
    rows = base.model.get_input_embeddings().weight.numpy()
    places = [np.flatnonzero((rows == value).all(axis=1)) for value in firsts[0]]
    assert all(len(found) == 1 and 3 <= found[0] < 259 for found in places), "no special token, none without a text"
    np.testing.assert_array_equal(firsts[0], firsts[1])
    np.testing.assert_array_equal(firsts[0], firsts[2])


def test_a_prompt_starts_from_the_words_that_it_is_given(nf4: LoadedBase) -> None:
    def text(length: int, words: str = "Hello") -> str:
        ids = initial_ids(nf4, PromptSpec(num_virtual_tokens=length, initial_text=words), 0)
        return str(nf4.tokenizer.decode(ids))

    assert (text(5), text(3), text(12)) == ("Hello", "Hel", "HelloHelloHe")


def test_the_real_vocabulary_gives_frequent_words_and_no_special_token() -> None:
    base = smollm()
    ids = initial_ids(base, PromptSpec(num_virtual_tokens=4096), 1)
    assert ids.min() >= 17, "SmolLM2's first 17 tokens are special"
    assert ids.max() < 17 + NUM_FREQUENT
    assert len(set(ids.tolist())) > 2000


def test_a_prefix_starts_small(nf4: LoadedBase) -> None:
    adapter = PrefixSpec(num_virtual_tokens=200)
    layout = layout_of(attach_adapter(nf4, adapter))
    for value in first_values(nf4, adapter, layout, 3).values():  # 12,800 draws: standard error 0.6 % of the deviation
        assert abs(value.std() / PREFIX_DEVIATION - 1) < 0.03
        assert abs(value.mean()) < 0.03 * PREFIX_DEVIATION


def test_a_text_without_tokens_is_refused(nf4: LoadedBase) -> None:
    nothing = PromptSpec(num_virtual_tokens=2, initial_text=" ")
    nf4.tokenizer.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Strip()
    with pytest.raises(ModelError, match="has no token"):
        initial_ids(nf4, nothing, 0)


def test_a_prefix_refuses_gradient_checkpointing(folder: Path) -> None:
    with pytest.raises(ModelError, match="cannot recompute a prefix"):
        attach_adapter(load_tiny(folder, gradient_checkpointing=True), KINDS["prefix"])
    with pytest.raises(ConfigError, match="cannot recompute a prefix"):
        read_run_config({"adapter.kind": "prefix", "model.gradient_checkpointing": True})


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("prompt", "rank", 4),
        ("prefix", "initial_text", "x"),
        ("lora", "num_virtual_tokens", 5),
        ("prompt", "encoder_hidden_size", 9),
    ],
)
def test_a_setting_of_another_kind_is_refused(kind: str, key: str, value: int | str) -> None:
    with pytest.raises(ConfigError, match=rf"adapter\.{key} has no effect with adapter\.kind='{kind}'"):
        read_run_config({"adapter.kind": kind, f"adapter.{key}": value})


@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix", "ptuning"])
def test_the_spec_holds_the_chosen_kinds_settings(kind: str) -> None:
    spec = read_run_config({"adapter.kind": kind}).spec
    assert spec.adapter.kind == kind
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec
    assert ("rank" in type(spec.adapter).model_fields) == (kind == "lora")


OWN: dict[str, SoftPromptSpec] = {
    "prompt": PromptSpec(num_virtual_tokens=2, num_personal_tokens=3),
    "prefix": PrefixSpec(num_virtual_tokens=2, num_personal_tokens=3),
}


@pytest.mark.parametrize("kind", sorted(OWN))
def test_a_sites_own_tokens_come_behind_the_shared_ones(base: LoadedBase, kind: str) -> None:
    """The oracle is a soft prompt of five tokens without any of the site's own."""
    model = with_prompt(base, OWN[kind])
    layout = layout_of(model)
    assert {spec.role: spec.shape[0] for spec in layout.tensors} == {kind: 2, f"personal_{kind}": 3}
    arrays, both = read_adapter(model, layout), logits_of(model, IDS)
    with without_personal(model):
        shared = logits_of(model, IDS)
        assert target_logits(model, collate([example(9, 1)], model)).shape == (8, 320)
    assert torch.equal(logits_of(model, IDS), both)
    for own, found in ((True, both), (False, shared)):
        part = layout if own else common_of(layout)
        whole = exported(taken(arrays, part), part)
        plain = attach_adapter(
            base, OWN[kind].model_copy(update={"num_virtual_tokens": len(whole), "num_personal_tokens": 0})
        )
        write_adapter(plain, layout_of(plain), imported({EXPORTED: whole}, layout_of(plain)))
        torch.testing.assert_close(found, logits_of(plain, IDS), rtol=1e-5, atol=1e-5)
    assert (both[:, -1] - shared[:, -1]).abs().max() > 1e-2


def test_a_sites_own_tokens_start_from_other_words_than_the_shared_ones(nf4: LoadedBase) -> None:
    adapter = PromptSpec(num_virtual_tokens=4, num_personal_tokens=4)
    first = first_values(nf4, adapter, layout_of(attach_adapter(nf4, adapter)), 1)
    assert set(first) == {"prompt_embeddings", "personal_embeddings"}
    assert not np.array_equal(first["prompt_embeddings"], first["personal_embeddings"])


@pytest.mark.parametrize("work", [ClientWork(), ClientWork(control_variates=True), ClientWork(proximal=0.1)])
def test_no_work_sends_a_sites_own_tokens(nf4: LoadedBase, work: ClientWork) -> None:
    adapter = layout_of(attach_adapter(nf4, OWN["prefix"]))
    state = work.state(adapter)
    assert not any("personal" in name for name in work.sent(state).names)
    assert not any("control/personal" in name for name in state.names)
    assert work.kept(adapter).names == ("personal.0", "personal.1")
    assert work.trained(adapter) == adapter
