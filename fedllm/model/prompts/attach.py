"""A soft prompt on a loaded base: PEFT's module for it, its parameters, and the values that it starts from.

A prompt starts from embeddings of the base's vocabulary, which train better than random ones (Lester et al., "The Power of
Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021, arXiv 2104.08691), and from the same at every site: prompts that
start apart mean different things, and their mean means nothing. Only who holds the base can look them up; see
docs/decisions/first-state.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

from fedllm.errors import ModelError, explain
from fedllm.model.prompts.parts import PromptParts
from fedllm.model.prompts.tensors import ENCODER, EXPORTED, PERSONAL_PREFIX, PERSONAL_PROMPT, PREFIX
from fedllm.model.spec import PrefixSpec, PromptSpec, PtuningSpec, SoftPromptSpec
from fedllm.rng import generator
from fedllm.update import Arrays

if TYPE_CHECKING:
    from fedllm.model.build import LoadedBase

NUM_FREQUENT = 5000
"""Tokens that a prompt's first values are drawn from, the first of the vocabulary: byte-pair and unigram vocabularies list
frequent tokens first. Lester et al. draw from as many."""


def peft_config(adapter: SoftPromptSpec) -> PeftConfig:
    """Return PEFT's config of a soft prompt to train."""
    num_virtual_tokens = adapter.num_virtual_tokens + _num_personal(adapter)
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": num_virtual_tokens}
    match adapter:
        case PromptSpec():
            return PromptTuningConfig(**common)
        case PrefixSpec():
            return PrefixTuningConfig(**common)
        case PtuningSpec():
            return PromptEncoderConfig(**common, encoder_hidden_size=adapter.encoder_hidden_size)


def is_soft_prompt(model: object) -> bool:
    """Tell whether a model carries a soft prompt."""
    return isinstance(model, PeftModel) and bool(model.active_peft_config.is_prompt_learning)


def take_apart(model: PeftModel, adapter: SoftPromptSpec) -> None:
    """Give every tensor of the layout a parameter of its own; P-tuning's network has that already."""
    encoders: Any = model.prompt_encoder
    config: Any = model.active_peft_config
    if isinstance(adapter, PtuningSpec):
        return
    assert config.num_layers, "PEFT has filled it in"
    shared, own = [EXPORTED], [PERSONAL_PROMPT]
    if isinstance(adapter, PrefixSpec):
        shared, own = ([f"{kind}{layer}" for layer in range(config.num_layers)] for kind in (PREFIX, PERSONAL_PREFIX))
    rows = [(adapter.num_virtual_tokens, shared), (adapter.num_personal_tokens, own)]
    whole = encoders[model.active_adapter].embedding.weight
    encoders[model.active_adapter] = PromptParts(whole, [row for row in rows if row[0]])


def parameters(model: PeftModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the soft prompt's parameters by tensor name."""
    encoder: Any = model.prompt_encoder[model.active_adapter]
    if isinstance(encoder, PromptParts):
        yield from encoder.by_name().items()
    else:
        yield from ((f"{ENCODER}{name}", value) for name, value in encoder.named_parameters())


def use_first(model: PeftModel, count: int) -> None:
    """Use and train the first so many of the shared virtual tokens, and all of the site's own."""
    encoder: Any = model.prompt_encoder[model.active_adapter]
    num_shared = _num_shared(encoder)
    own = torch.arange(num_shared, len(encoder.embedding.weight))
    _use(model, torch.cat((torch.arange(min(count, num_shared)), own)))


def num_used(model: PeftModel) -> int:
    """Return how many of the shared virtual tokens are in use."""
    encoder: Any = model.prompt_encoder[model.active_adapter]
    return int((model.prompt_tokens[model.active_adapter] < _num_shared(encoder)).sum())


@contextmanager
def without_personal(model: PeftModel) -> Iterator[None]:
    """Leave a site's own virtual tokens away; without any, nothing changes."""
    if not is_soft_prompt(model):
        yield
        return
    encoder: Any = model.prompt_encoder[model.active_adapter]
    numbers = model.prompt_tokens[model.active_adapter]
    _use(model, numbers[numbers < _num_shared(encoder)])
    try:
        yield
    finally:
        _use(model, numbers)


def _use(model: PeftModel, numbers: torch.Tensor) -> None:
    """Have PEFT look at these virtual tokens only, by their numbers."""
    model.prompt_tokens[model.active_adapter] = numbers
    config: Any = model.active_peft_config
    config.num_virtual_tokens = len(numbers)


def _num_shared(encoder: Any) -> int:
    return encoder.num_shared if isinstance(encoder, PromptParts) else len(encoder.embedding.weight)


def first_prompt(base: LoadedBase, adapter: PromptSpec, seed: int) -> Arrays:
    """Return the embeddings that a prompt starts from, the same bits wherever the base and the seed are the same."""
    ids = {EXPORTED: initial_ids(base, adapter, seed)}
    if adapter.num_personal_tokens:
        ids[PERSONAL_PROMPT] = _drawn_ids(base, PERSONAL_PROMPT, adapter.num_personal_tokens, seed)
    return {name: vocabulary_rows(base, tokens) for name, tokens in ids.items()}


def initial_ids(base: LoadedBase, adapter: PromptSpec, seed: int) -> NDArray[np.int64]:
    """Return the tokens [M] whose embeddings the shared part of a prompt starts from.

    Raises:
        ModelError: The tokenizer makes no token of the initial text.
    """
    if not adapter.initial_text:
        return _drawn_ids(base, EXPORTED, adapter.num_virtual_tokens, seed)
    ids = base.tokenizer(adapter.initial_text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ModelError(explain("adapter.initial_text has no token", found=repr(adapter.initial_text)))
    return np.resize(np.asarray(ids, np.int64), adapter.num_virtual_tokens)


def vocabulary_rows(base: LoadedBase, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the embeddings [M, H] of tokens as the first layer sees them."""
    embedding: Any = base.model.get_input_embeddings()
    with torch.no_grad():
        rows: torch.Tensor = embedding(torch.from_numpy(ids).to(embedding.weight.device))
    return rows.detach().float().cpu().numpy()


def _num_personal(adapter: SoftPromptSpec) -> int:
    return 0 if isinstance(adapter, PtuningSpec) else adapter.num_personal_tokens


def _drawn_ids(base: LoadedBase, name: str, count: int, seed: int) -> NDArray[np.int64]:
    return generator(seed, purpose=f"initial {name}").choice(_frequent_ids(base), count)


def _frequent_ids(base: LoadedBase) -> NDArray[np.int64]:
    embedding: Any = base.model.get_input_embeddings()
    added = base.tokenizer.added_tokens_decoder  # special tokens and such, by id
    known = min(len(base.tokenizer), embedding.weight.shape[0])
    return np.array([token for token in range(known) if token not in added][:NUM_FREQUENT], np.int64)
