"""Loss, perplexity and accuracy, and answers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedllm.model.build import LoadedBase, attach_adapter, layout_of, write_adapter
from fedllm.model.evaluate import LossTotals, evaluate_loss
from fedllm.model.generate import answer, without_adapter
from fedllm.model.initial import initial_arrays
from fedllm.model.spec import LoraSpec
from tests.bases import load_tiny, smollm
from tests.text import example, packed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    return load_tiny(tmp_path_factory.mktemp("base"))


SEQUENCES = [example(10, 1, first_target=4), packed(example(5, 2), example(9, 3, first_target=7)), example(17, 4)]


def test_totals_are_those_of_a_plain_computation(base: LoadedBase) -> None:
    """The oracle runs each example alone, without masks or hooks, and sums in NumPy float64."""
    loss, correct, num_targets = 0.0, 0, 0
    for part in (SEQUENCES[0], example(5, 2), example(9, 3, first_target=7), SEQUENCES[2]):
        with torch.no_grad():
            ids = torch.from_numpy(part.input_ids.astype(np.int64))[None]
            logits = base.model(input_ids=ids, use_cache=False).logits[0].numpy().astype(np.float64)
        log_likelihood = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for column in np.flatnonzero(part.target_mask):
            loss -= log_likelihood[column - 1, part.input_ids[column]]
            correct += int(logits[column - 1].argmax() == part.input_ids[column])
            num_targets += 1
    totals = evaluate_loss(base.model, SEQUENCES, 2)
    assert (totals.num_targets, totals.num_correct) == (num_targets, correct)
    assert totals.loss_sum == pytest.approx(loss, rel=1e-5)
    assert totals.loss == pytest.approx(loss / num_targets, rel=1e-5)
    assert totals.perplexity == pytest.approx(math.exp(loss / num_targets), rel=1e-4)
    assert totals.accuracy == correct / num_targets


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_the_batch_size_hardly_matters(base: LoadedBase, batch_size: int) -> None:
    assert evaluate_loss(base.model, SEQUENCES, batch_size).loss_sum == pytest.approx(
        evaluate_loss(base.model, SEQUENCES, 1).loss_sum, rel=1e-6
    )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_sequence_is_exact_if_every_target_is_what_the_model_ranks_first(base: LoadedBase, batch_size: int) -> None:
    """Sequences continued greedily, one token at a time, are exact; with the last token changed they are not."""
    greedy, wrong = [], []
    for seed, length in ((1, 6), (2, 9), (3, 4)):
        ids = example(length, seed).input_ids.astype(np.int64)
        with torch.no_grad():
            for _ in range(4):
                logits = base.model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits
                ids = np.append(ids, int(logits[0, -1].argmax()))
        other = np.append(ids[:-1], (ids[-1] + 1) % 320)
        for rows, values in ((greedy, ids), (wrong, other)):
            rows.append(replace(example(length + 4, seed, first_target=length), input_ids=values.astype(np.int32)))
    assert evaluate_loss(base.model, greedy, batch_size).num_exact == 3
    assert evaluate_loss(base.model, wrong, batch_size).num_exact == 0
    assert evaluate_loss(base.model, [greedy[0], wrong[1], greedy[2]], batch_size).num_exact == 2


def test_a_constant_model_has_the_loss_of_a_uniform_guess(tmp_path: Path) -> None:
    model = load_tiny(tmp_path, quantization="none", tie_embeddings=False).model
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.zeros_like(head.weight))
    totals = evaluate_loss(model, SEQUENCES, 4)
    assert totals.loss == pytest.approx(math.log(320), rel=1e-6)
    assert totals.perplexity == pytest.approx(320, rel=1e-5)


def test_the_mode_is_put_back(base: LoadedBase) -> None:
    for mode in (True, False):
        base.model.train(mode)
        evaluate_loss(base.model, SEQUENCES, 4)
        assert base.model.training is mode
    base.model.eval()


def test_totals_add_up_and_nothing_is_not_a_number() -> None:
    total = LossTotals(6.0, 3, 1) + LossTotals(2.0, 1, 1)
    assert (total.loss, total.accuracy, total.num_targets) == (2.0, 0.5, 4)
    empty = LossTotals(0.0, 0, 0)
    assert math.isnan(empty.loss)
    assert math.isnan(empty.accuracy)
    assert math.isnan(empty.perplexity)
    assert LossTotals(1e6, 1, 0).perplexity == math.inf


def test_sequences_without_targets_count_nothing(base: LoadedBase) -> None:
    assert evaluate_loss(base.model, [example(4, 1, first_target=9)], 4) == LossTotals(0.0, 0, 0)
    assert evaluate_loss(base.model, [], 4) == LossTotals(0.0, 0, 0)


def test_the_real_model_answers_and_the_adapter_can_be_switched_off() -> None:
    base = smollm()
    question = "What is the capital of France?"
    model = attach_adapter(base, LoraSpec(rank=2))
    plain = answer(model, base.tokenizer, question, 8)
    assert "Paris" in plain
    layout = layout_of(model)
    write_adapter(model, layout, {name: value + 0.05 for name, value in initial_arrays(layout, 1).items()})
    with without_adapter(model):
        assert answer(model, base.tokenizer, question, 8) == plain
    assert answer(model, base.tokenizer, question, 8) != plain


def test_an_answer_is_bounded_and_follows_the_system_message() -> None:
    base = smollm()
    model = attach_adapter(base, LoraSpec(rank=2))
    short, long = (answer(model, base.tokenizer, "Count from one to ten.", limit) for limit in (3, 6))
    assert len(base.tokenizer(short)["input_ids"]) <= 3
    assert long.startswith(short)
    assert len(long) > len(short)
    assert answer(model, base.tokenizer, "Count from one to ten.", 6, system="You are a poet.") != long
