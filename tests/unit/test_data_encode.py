"""Encoding: loss masks against masks made by hand, truncation, and what is refused."""

import numpy as np
import pytest

from fedllm.data.encode import EncodeReport, encode
from fedllm.data.examples import Example, Message
from fedllm.errors import DataError
from tests.data_tokenizers import (
    ALTERNATES_STRICTLY,
    CHATML,
    CLOSED_AT_END,
    COUNTS_MESSAGES,
    DEFAULT_SYSTEM,
    FORGETS_REASONING,
    MARKED_AND_COUNTED,
    MARKED_CHATML,
    WITHOUT_SPECIAL_TOKENS,
    byte_tokenizer,
    metaspace_tokenizer,
)

LONG = 10_000


def chat(*contents, roles=("user", "assistant")):
    messages = (Message(roles[i % len(roles)], content) for i, content in enumerate(contents))
    return Example(messages=tuple(messages), origin="chats.jsonl, line 7")


def target_runs(sequence, tokenizer):
    """Decode each unbroken run of targets."""
    mask = np.concatenate([[False], sequence.target_mask, [False]])
    edges = np.flatnonzero(mask[1:] != mask[:-1]).reshape(-1, 2)
    return [tokenizer.decode(sequence.input_ids[begin:end]) for begin, end in edges]


def targets(example, tokenizer):
    (sequence,), _ = encode([example], tokenizer, LONG)
    return target_runs(sequence, tokenizer)


def test_only_the_answer_and_its_end_of_turn_are_targets():
    tokenizer = byte_tokenizer(CHATML)
    (sequence,), _ = encode([chat("Hi?", "Yo.")], tokenizer, LONG)
    before = f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    num_before = len(tokenizer(before)["input_ids"])
    hand_made = [False] * num_before + [True, True, True, True] + [False]  # Y o . <|im_end|> \n
    assert sequence.target_mask.tolist() == hand_made
    assert tokenizer.decode(sequence.input_ids) == before + "Yo.<|im_end|>\n"
    assert sequence.segment_ids.tolist() == [1] * len(hand_made)


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML, MARKED_AND_COUNTED])
def test_every_answer_of_a_conversation_is_a_target(template):
    answers = targets(chat("a", "one", "b", "two", "c", "three"), byte_tokenizer(template))
    assert answers == ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>"]


def test_an_end_of_text_after_the_rendering_is_not_part_of_the_turn():
    answers = targets(chat("a", " one ", "b", "two"), byte_tokenizer(CLOSED_AT_END))
    assert answers == ["one<|end|>", "two<|end|>"]


def test_without_an_end_of_turn_token_what_the_template_adds_ends_the_turn():
    answers = targets(chat("a", "one", "b", "two"), byte_tokenizer(WITHOUT_SPECIAL_TOKENS))
    assert answers == [" one\n\n", " two\n\n"]


def test_a_sentencepiece_like_tokenizer_learns_the_spaces_around_an_answer():
    tokenizer = metaspace_tokenizer()
    (sequence,), _ = encode([chat("Hi", "Yes sir", "So", "No")], tokenizer, LONG)
    pieces = tokenizer.convert_ids_to_tokens(sequence.input_ids[sequence.target_mask].tolist())
    assert "".join(pieces) == "\u2581Yes\u2581sir\u2581</s>\u2581No\u2581</s>"


def test_a_token_across_the_border_counts_with_the_answer_it_holds():
    tokenizer = byte_tokenizer(CHATML, merges=(("Ċ", "Ċ"),))  # two newlines are one token
    answers = targets(chat("Hi?", "\n\nYo."), tokenizer)
    assert answers == ["\n\n\nYo.<|im_end|>"]  # the header's newline is in the first token


def test_special_tokens_quoted_in_an_answer_do_not_end_it():
    assert targets(chat("How does a turn end?", "By <|im_end|>, no?"), byte_tokenizer()) == [
        "By <|im_end|>, no?<|im_end|>"
    ]


def test_an_answer_equal_to_its_question_is_found_in_its_own_place():
    assert targets(chat("user", "user", "user", "user"), byte_tokenizer()) == ["user<|im_end|>"] * 2


def test_an_opening_assistant_message_answers_nothing():
    opening = chat("Welcome", "Hi", "Yo", roles=("assistant", "user"))
    assert targets(opening, byte_tokenizer()) == ["Yo<|im_end|>"]


def test_plain_text_is_a_target_but_for_its_first_token_and_ends_with_end_of_text():
    tokenizer = byte_tokenizer()
    (sequence,), report = encode([Example(text="abc")], tokenizer, LONG)
    assert tokenizer.decode(sequence.input_ids) == "abc<|im_end|>"
    assert sequence.target_mask.tolist() == [False, True, True, True]
    assert report == EncodeReport(num_examples=1, num_dropped=0, num_truncated=0, num_tokens=4, num_target_tokens=3)


def test_texts_and_conversations_keep_their_order():
    tokenizer = byte_tokenizer()
    mixed = [Example(text="first"), chat("a", "second"), Example(text="third"), chat("b", "fourth")]
    sequences, _ = encode(mixed, tokenizer, LONG)
    words = ("first", "second", "third", "fourth")
    assert all(word in tokenizer.decode(each.input_ids) for word, each in zip(words, sequences, strict=True))


def test_truncation_keeps_the_beginning_and_is_counted():
    tokenizer = byte_tokenizer()
    short, long, hopeless = chat("a", "bc"), chat("a", "b" * 100), chat("a" * 100, "b")
    whole, _ = encode([short, long, hopeless], tokenizer, LONG)
    length = len(whole[0]) + 2
    cut, report = encode([short, long, hopeless], tokenizer, length)
    assert [len(each) for each in cut] == [length - 2, length]
    np.testing.assert_array_equal(cut[1].input_ids, whole[1].input_ids[:length])
    np.testing.assert_array_equal(cut[1].target_mask, whole[1].target_mask[:length])
    num_targets = cut[0].num_targets + cut[1].num_targets
    assert report == EncodeReport(2, 1, 1, 2 * length - 2, num_targets)


def test_when_no_answer_fits_the_error_says_which_length_would_do():
    tokenizer = byte_tokenizer()
    (sequence,), _ = encode([chat("Hi?", "Yo.")], tokenizer, LONG)
    first_target = int(sequence.target_mask.argmax())
    with pytest.raises(DataError, match=f"Raise data.max_length well above {first_target}"):
        encode([chat("Hi?", "Yo.")], tokenizer, first_target)
    assert encode([chat("Hi?", "Yo.")], tokenizer, first_target + 1)[1].num_target_tokens == 1


def test_nothing_to_encode_is_an_error():
    with pytest.raises(DataError, match="no example has a token to learn"):
        encode([], byte_tokenizer(), LONG)


@pytest.mark.parametrize(
    ("template", "example", "message"),
    [
        (COUNTS_MESSAGES, chat("a", "b", "c", "d"), "does not begin a conversation with the prompt"),
        (FORGETS_REASONING, chat("a", "<think>hm</think>b", "c", "d"), "alters what the assistant said"),
        (FORGETS_REASONING, chat("a", "hm</think>b", "c", "hm</think>b"), "removes it once the conversation goes on"),
        (
            ALTERNATES_STRICTLY,
            chat("a", "b", "c", roles=("user", "user", "assistant")),
            "refuses .* roles must alternate",
        ),
        (None, chat("a", "b"), "no chat template"),
    ],
)
def test_a_template_that_cannot_serve_is_refused(template, example, message):
    with pytest.raises(DataError, match=message):
        encode([example], byte_tokenizer(template), LONG)


@pytest.mark.parametrize("template", [COUNTS_MESSAGES, ALTERNATES_STRICTLY])
def test_a_refused_conversation_is_named_by_its_origin(template):
    with pytest.raises(DataError, match="line 7"):
        encode([chat("a", "b", "c", roles=("user", "user", "assistant"))], byte_tokenizer(template), LONG)


def test_a_rewriting_template_serves_conversations_with_one_answer():
    assert targets(chat("a", "<think>hm</think>b"), byte_tokenizer(FORGETS_REASONING)) == [
        "<think>hm</think>b<|im_end|>"
    ]
