"""Where the assistant speaks in a conversation rendered by a chat template.

Loss counts only on what the model would have to write itself: an assistant's content and what ends its turn. For any
template, an assistant's turn begins where the generation prompt for the messages before it ends,
``render(messages[:i], add_generation_prompt=True)``, so training and answering see the same prompt. The turn reaches as
far as ``render(messages[:i + 1])`` agrees with the whole conversation. Both are checked: a template that writes the past
differently once the conversation goes on (one that removes earlier reasoning, or counts the turns) would train on a
prompt that is never seen, and is refused.

Everything here is in characters of the rendered text; :mod:`fedllm.data.encode` maps it to tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from fedllm.data.examples import Example, Message
from fedllm.errors import DataError, explain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Turn:
    """One assistant's turn, as character positions in the rendered text.

    Attributes:
        start: First character that the model writes.
        content_end: End of the content proper.
        end: End of what the template adds to the turn, before the next message begins.
    """

    start: int
    content_end: int
    end: int


def render(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, tuple[Turn, ...]]:
    """Render a conversation and find the assistant's turns in it.

    An assistant's message that opens the conversation answers nothing and is not returned as a turn.

    Raises:
        DataError: The template refuses the conversation, rewrites earlier turns, or alters the assistant's words.
    """
    messages = example.messages
    text = _apply(messages, tokenizer, example, generate=False)
    spoken = [i for i, message in enumerate(messages) if message.role == "assistant" and i > 0]
    return text, tuple(_turn(i, text, example, tokenizer) for i in spoken)


def _turn(index: int, text: str, example: Example, tokenizer: PreTrainedTokenizerBase) -> Turn:
    messages = example.messages
    prompt = _apply(messages[:index], tokenizer, example, generate=True)
    if not text.startswith(prompt):
        raise _unusable(example, "does not begin a conversation with the prompt that asks for its next turn")
    content_end = _find_end(messages[index].content, text, len(prompt))
    is_last = index == len(messages) - 1
    until = text if is_last else _apply(messages[: index + 1], tokenizer, example, generate=False)
    # Some templates close a rendering that asks for nothing with an end-of-text token: agree as far as both go.
    end = len(until) if text.startswith(until) else _agreement(text, until)
    if content_end is None or content_end > end:
        raise _unusable(example, "alters what the assistant said, or removes it once the conversation goes on")
    return Turn(len(prompt), content_end, end)


def _find_end(content: str, text: str, start: int) -> int | None:
    stripped = content.strip()  # many templates trim a message, and some put a space before it
    found = text.find(stripped, start)
    return None if found < 0 else found + len(stripped)


def _agreement(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _apply(
    messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerBase, example: Example, *, generate: bool
) -> str:
    chat = [message._asdict() for message in messages]
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate))
    except TemplateError as error:
        raise refusal(example, error) from error


def refusal(example: Example, error: Exception) -> DataError:
    """Return the error for a conversation that the template itself refuses."""
    fix = "Change the roles or their order to what the base model's chat template allows."
    return DataError(explain("the chat template refuses a conversation", found=error, where=example.origin, fix=fix))


def _unusable(example: Example, how: str) -> DataError:
    fix = "Use conversations with one answer each, or a template that marks answers with {% generation %}."
    return DataError(explain(f"the chat template {how}", where=example.origin, fix=fix))
