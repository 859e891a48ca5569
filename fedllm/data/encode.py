"""From examples to token sequences, with the loss on what the model should learn to write.

A conversation goes through the tokenizer's own chat template as it stands, default system prompt included, and is
tokenized once as a whole, because tokens may reach across the border between prompt and answer. Targets are the tokens
of the assistant's content and the special token that ends the turn. Where the template marks answers itself with
``{% generation %}``, its marks count; otherwise :mod:`fedllm.data.chat` finds them. Plain text is a target throughout and
ends with the tokenizer's end-of-text token. The first token has nothing before it and is never a target.

Shape legend: L tokens in an example.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from fedllm.data.chat import Turn, refusal, render
from fedllm.data.examples import Example
from fedllm.data.sequences import Sequence
from fedllm.errors import DataError, explain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS_ANSWERS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_CHUNK = 1024  # examples tokenized at once: enough to use all cores, few enough to keep the offsets small


@dataclass(frozen=True)
class EncodeReport:
    """What became of the examples.

    Attributes:
        num_examples: Examples that gave a sequence.
        num_dropped: Examples left out because nothing to learn was left within the length.
        num_truncated: Examples kept, but cut at the length.
        num_tokens: Tokens in the sequences.
        num_target_tokens: Tokens that count in the loss.
    """

    num_examples: int
    num_dropped: int
    num_truncated: int
    num_tokens: int
    num_target_tokens: int


def encode(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Sequence], EncodeReport]:
    """Tokenize examples, one sequence each, in their order.

    Args:
        examples: Conversations, plain text, or both.
        tokenizer: The base model's, with character offsets (a fast tokenizer) and, for conversations, a chat template.
        max_length: Tokens kept of an example, from its beginning.

    Returns:
        Sequences of at most ``max_length`` tokens, each with at least one target, and what was cut and left out.

    Raises:
        DataError: The tokenizer cannot serve, the template breaks an example, or no example has a target left.
    """
    tokenized = [_masked(*pair) for pair in _tokenize_all(examples, tokenizer)]
    sequences = [_cut(sequence, max_length) for sequence in tokenized]
    kept = [sequence for sequence in sequences if sequence.num_targets]
    if not kept:
        raise _nothing_left(tokenized, max_length)
    num_truncated = sum(
        len(whole) > max_length and cut.num_targets > 0 for whole, cut in zip(tokenized, sequences, strict=True)
    )
    num_tokens, num_targets = sum(map(len, kept)), sum(sequence.num_targets for sequence in kept)
    return kept, EncodeReport(len(kept), len(examples) - len(kept), num_truncated, num_tokens, num_targets)


def _nothing_left(tokenized: list[Sequence], max_length: int) -> DataError:
    firsts = [int(sequence.target_mask.argmax()) for sequence in tokenized if sequence.num_targets]
    if not firsts:
        found = f"{len(tokenized)} examples without any"
        return DataError(
            explain("no example has a token to learn", found=found, fix="Check data.source and data.format.")
        )
    found = f"{len(tokenized)} examples whose answers begin after {min(firsts)} tokens or later"
    fix = f"Raise data.max_length well above {min(firsts)}."
    return DataError(
        explain("no example has a token to learn", expected=f"one within {max_length}", found=found, fix=fix)
    )


Tokens = tuple[list[int], NDArray[np.bool_]]


def _tokenize_all(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        chats = [example for example in chunk if example.messages]
        chat_tokens = _tokenize_chats(chats, tokenizer) if chats else iter(())
        text_tokens = _tokenize_texts([example.text for example in chunk if example.text], tokenizer)
        for example in chunk:
            yield next(chat_tokens if example.messages else text_tokens)


def _tokenize_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for ids in tokenizer(texts, verbose=False)["input_ids"] if texts else ():
        ended = ids if ids[-1:] == end else ids + end
        yield ended, np.ones(len(ended), bool)


def _tokenize_chats(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    if _MARKS_ANSWERS.search(_template(tokenizer)):
        return _tokenize_marked(examples, tokenizer)
    return _tokenize_rendered(examples, tokenizer)


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.is_fast:
        raise DataError(
            explain("the tokenizer gives no character offsets", expected="a fast tokenizer (tokenizer.json)")
        )
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        fix = "Use an instruction-tuned base, or plain text."
        raise DataError(explain("the base's tokenizer has no chat template for conversations", fix=fix)) from error


def _tokenize_marked(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    for example in examples:
        chat = [message._asdict() for message in example.messages]
        try:
            tokens: Any = tokenizer.apply_chat_template(
                chat, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
            )
        except TemplateError as error:
            raise refusal(example, error) from error
        yield tokens["input_ids"], np.array(tokens["assistant_masks"], bool)


def _tokenize_rendered(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    texts, turns = zip(*(render(example, tokenizer) for example in examples), strict=True)
    special = _special_ids(tokenizer)
    tokens = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for ids, offsets, each in zip(tokens["input_ids"], tokens["offset_mapping"], turns, strict=True):
        is_special = np.fromiter((token in special for token in ids), bool, len(ids))
        yield ids, _target_mask(np.array(offsets, np.int64), is_special, each)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _target_mask(
    offsets: NDArray[np.int64], is_special: NDArray[np.bool_], turns: tuple[Turn, ...]
) -> NDArray[np.bool_]:
    """Return bool [L], True for tokens that hold content of a turn, up to and with the special token that ends it.

    A token that reaches across a border belongs to the content it holds. Without a special token after the content,
    everything the template writes to close the turn is a target.
    """
    begins, ends = offsets.reshape(-1, 2).T  # [L] each, in characters
    mask = np.zeros(len(begins), bool)
    for turn in turns:
        closing = np.flatnonzero(is_special & (begins >= turn.content_end) & (ends <= turn.end))
        end = ends[closing[0]] if len(closing) else turn.end
        inside = (ends > turn.start) & ((ends <= end) | (begins < turn.content_end))
        mask |= inside & (begins < ends)
    return mask


def _masked(ids: list[int], targets: NDArray[np.bool_]) -> Sequence:
    targets[:1] = False
    return Sequence(np.array(ids, np.int32), targets, np.ones(len(ids), np.int32))


def _cut(sequence: Sequence, max_length: int) -> Sequence:
    if len(sequence) <= max_length:
        return sequence
    head = slice(max_length)
    return Sequence(sequence.input_ids[head], sequence.target_mask[head], sequence.segment_ids[head])
