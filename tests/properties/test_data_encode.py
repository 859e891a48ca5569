"""Encoding of any conversation, against an oracle that puts it together piece by piece."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.data.encode import encode
from fedllm.data.examples import Example, Message
from tests.data_tokenizers import CHATML, DEFAULT_SYSTEM, MARKED_CHATML, SPECIAL_TOKENS, byte_tokenizer

tokenizer_for = functools.cache(byte_tokenizer)

contents = st.one_of(
    st.text(max_size=12),
    st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "\n", "assistant", "x"]), max_size=4).map("".join),
)
turns = st.lists(st.tuples(contents, contents), min_size=1, max_size=4)
systems = st.none() | contents


def messages_of(system, pairs):
    opening = [] if system is None else [Message("system", system)]
    return tuple(opening + [m for ask, answer in pairs for m in (Message("user", ask), Message("assistant", answer))])


def pieced_together(messages, tokenizer):
    """Return ids and mask by tokenizing each piece alone: right because a byte tokenizer without merges joins nothing."""
    ids, mask = [], []

    def add(text, is_target):
        piece = tokenizer(text)["input_ids"]
        ids.extend(piece)
        mask.extend([is_target] * len(piece))

    if messages[0].role != "system":
        add(f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n", False)
    for message in messages:
        add(f"<|im_start|>{message.role}\n", False)
        add(message.content + "<|im_end|>", message.role == "assistant")
        add("\n", False)
    return ids, mask


@settings(deadline=None, max_examples=150)
@given(systems, turns)
def test_targets_are_the_answers_with_their_end_of_turn_whatever_is_said(system, pairs):
    tokenizer = tokenizer_for(CHATML)
    messages = messages_of(system, pairs)
    (sequence,), report = encode([Example(messages=messages)], tokenizer, 100_000)
    ids, mask = pieced_together(messages, tokenizer)
    assert sequence.input_ids.tolist() == ids
    assert sequence.target_mask.tolist() == mask
    assert (report.num_tokens, report.num_target_tokens) == (len(ids), sum(mask))


@settings(deadline=None, max_examples=100)
@given(systems, turns)
def test_marks_in_the_template_and_prefix_rendering_agree(system, pairs):
    example = Example(messages=messages_of(system, pairs))
    (found,), _ = encode([example], tokenizer_for(CHATML), 100_000)
    (marked,), _ = encode([example], tokenizer_for(MARKED_CHATML), 100_000)
    assert found.input_ids.tolist() == marked.input_ids.tolist()
    assert found.target_mask.tolist() == marked.target_mask.tolist()


@settings(deadline=None, max_examples=60)
@given(st.lists(turns, min_size=1, max_size=6), st.integers(8, 200))
def test_counts_add_up_and_nothing_exceeds_the_length(conversations, max_length):
    tokenizer = tokenizer_for(CHATML)
    examples = [Example(messages=messages_of("", pairs)) for pairs in conversations]
    whole, _ = encode(examples, tokenizer, 100_000)
    learnable = [each for each in whole if each.target_mask[:max_length].any()]
    if not learnable:
        return
    sequences, report = encode(examples, tokenizer, max_length)
    assert report.num_examples == len(sequences) == len(learnable)
    assert report.num_dropped == len(examples) - len(learnable)
    assert report.num_truncated == sum(len(each) > max_length for each in learnable)
    assert report.num_tokens == sum(map(len, sequences)) == sum(min(len(each), max_length) for each in learnable)
    assert all(each.num_targets > 0 and not each.target_mask[0] for each in sequences)
