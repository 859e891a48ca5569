"""Batches: no example sees another, and only targets are computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from fedllm.data.sequences import Sequence
from fedllm.errors import DataError
from fedllm.model.batch import Arrangement, arrangement_for, collate, target_logits
from fedllm.model.build import attach_adapter, layout_of, write_adapter
from fedllm.model.initial import initial_arrays
from fedllm.model.spec import LoraSpec
from tests.bases import load_tiny, smollm
from tests.text import example, packed

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A model whose adapter does something."""
    base = load_tiny(tmp_path_factory.mktemp("base"), attention=request.param)
    wrapped = attach_adapter(base, LoraSpec(rank=4))
    layout = layout_of(wrapped)
    write_adapter(wrapped, layout, {name: value + 0.05 for name, value in initial_arrays(layout, 1).items()})
    return wrapped


def logits(model: nn.Module, *rows: Sequence, arrangement: Arrangement | None = None) -> torch.Tensor:
    with torch.no_grad():
        return target_logits(model, collate(rows, model, arrangement))


@pytest.mark.parametrize("arrangement", ["mask", "positions", "flat"])
def test_packed_examples_are_computed_as_if_alone(model: nn.Module, arrangement: Arrangement) -> None:
    parts = [example(9, 1), example(14, 2, first_target=6), example(2, 3), example(5, 4)]
    alone = torch.cat([logits(model, part) for part in parts])
    together = logits(model, packed(*parts[:2]), packed(*parts[2:]), arrangement=arrangement)
    torch.testing.assert_close(together, alone, **TOLERANCE)


@pytest.mark.parametrize("arrangement", ["mask", "positions", "flat"])
def test_changing_one_example_changes_no_bit_of_another(model: nn.Module, arrangement: Arrangement) -> None:
    first, other, second = example(9, 1), example(9, 7), example(12, 2)
    before = logits(model, packed(first, second), arrangement=arrangement)
    after = logits(model, packed(other, second), arrangement=arrangement)
    assert torch.equal(before[first.num_targets :], after[first.num_targets :])
    assert not torch.equal(before[: first.num_targets], after[: first.num_targets])


def test_the_test_above_would_notice_a_leak(model: nn.Module) -> None:
    """Without segments the second example does see the first."""
    first, other, second = example(9, 1), example(9, 7), example(12, 2)
    rows = [packed(one, second) for one in (first, other)]
    leaky = [Sequence(row.input_ids, row.target_mask, np.ones(len(row), np.int32)) for row in rows]
    before, after = (logits(model, row)[first.num_targets :] for row in leaky)
    assert (before - after).abs().max() > 1e-2


def test_padding_changes_nothing(model: nn.Module) -> None:
    short, long = example(6, 1), example(30, 2)
    alone = torch.cat([logits(model, short), logits(model, long)])
    torch.testing.assert_close(logits(model, short, long), alone, **TOLERANCE)


def test_target_logits_are_those_of_the_plain_forward_pass(model: nn.Module) -> None:
    row = example(16, 5, first_target=9)
    with torch.no_grad():
        full = model(input_ids=torch.from_numpy(row.input_ids.astype(np.int64))[None], use_cache=False).logits[0]
    torch.testing.assert_close(logits(model, row), full[8:15], **TOLERANCE)


def test_the_hook_on_the_head_does_not_stay(model: nn.Module) -> None:
    ids = torch.arange(3, 10)[None]
    logits(model, example(16, 5, first_target=9))
    assert model(input_ids=ids).logits.shape == (1, 7, 320)
    broken = collate([example(4, 1)], model)
    object.__setattr__(broken, "input_ids", torch.full((1, 4), 10_000))
    with pytest.raises(IndexError):
        target_logits(model, broken)
    assert model(input_ids=ids).logits.shape == (1, 7, 320)


def test_the_arrays_of_a_batch_are_what_they_are_said_to_be(model: nn.Module) -> None:
    one, two, three = example(3, 1), example(2, 2), example(4, 3, first_target=2)
    batch = collate([packed(one, two), three], model)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch.input_ids.tolist() == [[*one.input_ids, *two.input_ids], [*three.input_ids, 0]]
    places = list(zip(batch.target_rows.tolist(), batch.target_columns.tolist(), strict=True))
    assert places == [(0, 0), (0, 1), (0, 3), (1, 1), (1, 2)]
    assert batch.targets.tolist() == [*one.input_ids[1:], two.input_ids[1], *three.input_ids[2:]]
    assert batch.num_tokens == 9
    assert batch.attention_mask is not None
    attends = (
        batch.attention_mask[0, 0] if batch.attention_mask.dtype == torch.bool else batch.attention_mask[0, 0] == 0
    )
    assert attends.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_no_mask_is_made_without_packing(model: nn.Module) -> None:
    assert collate([example(3, 1), example(9, 2)], model).attention_mask is None


def test_a_target_that_nothing_predicts_is_refused(model: nn.Module) -> None:
    row = packed(example(3, 1), example(3, 2))
    for column in (0, 3):
        mask = row.target_mask.copy()
        mask[column] = True
        with pytest.raises(DataError, match="first token of a segment"):
            collate([Sequence(row.input_ids, mask, row.segment_ids)], model)
    with pytest.raises(DataError, match="empty"):
        collate([], model)


class WithConfig(nn.Module):
    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config


def test_the_arrangement_follows_the_attention() -> None:
    plain = LlamaConfig(attn_implementation="sdpa")
    flash = LlamaConfig(attn_implementation="flash_attention_2")
    sliding = Gemma3TextConfig(attn_implementation="sdpa")
    arrangements = [arrangement_for(WithConfig(config)) for config in (plain, flash, sliding)]
    assert arrangements == ["mask", "flat", "positions"]


def test_the_real_model_does_not_mix_packed_examples() -> None:
    model = smollm().model
    parts = [example(20, 1, vocabulary=40_000), example(25, 2, vocabulary=40_000)]
    alone = torch.cat([logits(model, part) for part in parts])
    torch.testing.assert_close(logits(model, packed(*parts)), alone, rtol=1e-3, atol=2e-3)
    other = logits(model, packed(example(20, 3, vocabulary=40_000), parts[1]))
    assert torch.equal(other[19:], logits(model, packed(*parts))[19:])


def test_sliding_windows_survive_packing() -> None:
    """Layers that attend to the last few tokens only must do so within a packed sequence too."""
    config = Gemma3TextConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    parts = [example(15, 1), example(15, 2)]
    alone = torch.cat([logits(model, part) for part in parts])
    torch.testing.assert_close(logits(model, packed(*parts)), alone, rtol=1e-4, atol=1e-4)
    masked = logits(model, packed(*parts), arrangement="mask")
    assert (masked - alone).abs().max() > 1e-3, "a plain mask would do, and the arrangement is not needed"
