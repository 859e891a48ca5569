"""Virtual tokens in packed and padded batches against PEFT's own forward pass, one example at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from fedllm.data.sequences import Sequence
from fedllm.model.adapter import wrap
from fedllm.model.batch import Arrangement, collate, target_logits
from fedllm.model.evaluate import evaluate_loss
from fedllm.model.generate import answer, without_adapter
from fedllm.model.spec import SoftPromptSpec
from tests.bases import load_tiny, smollm
from tests.soft_prompts import KINDS, NUM_TOKENS, with_prompt
from tests.text import example, packed

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
PARTS = [example(9, 1), example(14, 2, first_target=6), example(2, 3), example(5, 4)]
ROWS = [packed(*PARTS[:2]), packed(*PARTS[2:])]
ARRANGEMENTS: list[Arrangement] = ["mask", "positions", "flat"]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return tmp_path_factory.mktemp("base"), request.param


@pytest.fixture(params=sorted(KINDS))
def adapter(request: pytest.FixtureRequest) -> SoftPromptSpec:
    return KINDS[request.param]


@pytest.fixture
def model(folder: tuple[Path, str], adapter: SoftPromptSpec) -> PeftModel:
    return with_prompt(load_tiny(folder[0], attention=folder[1]), adapter)


def logits(model: PeftModel, *rows: Sequence, arrangement: Arrangement | None = None) -> torch.Tensor:
    with torch.no_grad():
        return target_logits(model, collate(rows, model, arrangement))


def by_peft(model: PeftModel, part: Sequence) -> torch.Tensor:
    """Return the logits [T, V] at one example's targets by PEFT's own forward pass."""
    found = model(input_ids=torch.from_numpy(part.input_ids.astype(np.int64))[None], use_cache=False).logits[0]
    num_extra = len(found) - len(part)
    assert num_extra in (0, NUM_TOKENS), "a prompt makes the sequence longer, a prefix does not"
    return found[np.flatnonzero(part.target_mask) - 1 + num_extra]


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_packed_and_padded_examples_are_computed_as_peft_computes_each_alone(
    model: PeftModel, arrangement: Arrangement
) -> None:
    with torch.no_grad():
        alone = torch.cat([by_peft(model, part) for part in PARTS])
    torch.testing.assert_close(logits(model, *ROWS, arrangement=arrangement), alone, **TOLERANCE)
    torch.testing.assert_close(logits(model, *PARTS), alone, **TOLERANCE)
    with without_adapter(model):
        assert (logits(model, *ROWS) - alone).abs().max() > 1e-2, "the prompt does nothing"


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_changing_one_example_changes_no_bit_of_another(model: PeftModel, arrangement: Arrangement) -> None:
    first, other, second = example(9, 1), example(9, 7), example(12, 2)
    before = logits(model, packed(first, second), arrangement=arrangement)
    after = logits(model, packed(other, second), arrangement=arrangement)
    assert torch.equal(before[first.num_targets :], after[first.num_targets :])
    assert not torch.equal(before[: first.num_targets], after[: first.num_targets])


def test_the_loss_and_the_prompts_gradient_are_those_of_examples_alone(model: PeftModel) -> None:
    def gradients(together: bool) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        found = (
            target_logits(model, collate(ROWS, model)) if together else torch.cat([by_peft(model, p) for p in PARTS])
        )
        targets = torch.cat([torch.from_numpy(part.input_ids[part.target_mask]).long() for part in PARTS])
        loss = cross_entropy(found, targets, reduction="sum")
        loss.backward()
        return float(loss.detach()), {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }

    (loss, grads), (expected_loss, expected) = gradients(True), gradients(False)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert set(grads) == set(expected)
    assert all(name.startswith("prompt_encoder.") for name in grads)
    for name, value in expected.items():
        torch.testing.assert_close(grads[name], value, rtol=1e-3, atol=1e-4)
        assert value.any()


def test_evaluation_is_the_same_packed_or_not_and_in_any_batches(model: PeftModel) -> None:
    whole, alone = evaluate_loss(model, ROWS, 4), evaluate_loss(model, PARTS, 1)
    assert whole.num_targets == alone.num_targets == sum(part.num_targets for part in PARTS)
    assert whole.loss_sum == pytest.approx(alone.loss_sum, rel=1e-5)
    with without_adapter(model):
        assert abs(evaluate_loss(model, ROWS, 4).loss - whole.loss) > 1e-3


def test_a_batch_counts_real_tokens_and_knows_where_virtual_ones_stand(
    model: PeftModel, adapter: SoftPromptSpec
) -> None:
    batch = collate([packed(example(3, 1), example(2, 2)), example(4, 3, first_target=2)], model)
    assert batch.num_tokens == 9
    if adapter.kind == "prefix":
        assert batch.virtual is None
        return
    assert batch.virtual is not None
    assert batch.virtual.tolist() == [
        [0, 1, 2, -1, -1, -1, 0, 1, 2, -1, -1],
        [0, 1, 2, -1, -1, -1, -1, -1, -1, -1, -1],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]]
    assert list(zip(batch.target_rows.tolist(), batch.target_columns.tolist(), strict=True)) == [
        (0, 3), (0, 4), (0, 9), (1, 4), (1, 5),
    ]  # fmt: skip


def test_a_greedy_answer_is_what_one_token_after_the_other_gives(model: PeftModel, folder: tuple[Path, str]) -> None:
    tokenizer = load_tiny(folder[0], attention=folder[1]).tokenizer
    chat = [{"role": "user", "content": "Why?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(6):
            next_id = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
            ids = torch.cat((ids, next_id.view(1, 1)), dim=1)
    expected = str(tokenizer.decode(ids[0, start:], skip_special_tokens=True)).strip()
    assert answer(model, tokenizer, "Why?", 6) == expected
    with without_adapter(model):
        assert answer(model, tokenizer, "Why?", 6) != expected


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path, adapter: SoftPromptSpec) -> None:
    if adapter.kind == "prefix":
        pytest.skip("refused, see tests/unit/test_prompts.py")

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = with_prompt(load_tiny(tmp_path, gradient_checkpointing=checkpointing), adapter)
        model.train()
        assert model.get_base_model().model.is_activation_checkpointing is checkpointing
        target_logits(model, collate(ROWS, model)).square().mean().backward()
        return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    assert set(plain) == set(recomputed)
    for name in plain:
        torch.testing.assert_close(plain[name], recomputed[name], rtol=1e-6, atol=1e-9)


def test_sliding_windows_survive_packing_with_a_prompt(adapter: SoftPromptSpec) -> None:
    """Gemma also scales its embeddings, which a prompt must not be."""
    config = Gemma3TextConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = wrap(AutoModelForCausalLM.from_config(config).eval(), adapter).eval()
    with torch.no_grad():
        alone = torch.cat([by_peft(model, part) for part in PARTS])
    torch.testing.assert_close(logits(model, *ROWS), alone, rtol=1e-4, atol=1e-4)


def test_the_real_model_does_not_mix_packed_examples(adapter: SoftPromptSpec) -> None:
    model = with_prompt(smollm(), adapter)
    parts = [example(20, 1, vocabulary=40_000), example(25, 2, vocabulary=40_000)]
    with torch.no_grad():
        alone = torch.cat([by_peft(model, part) for part in parts])
    torch.testing.assert_close(logits(model, packed(*parts)), alone, rtol=1e-3, atol=5e-3)
