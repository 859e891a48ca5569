"""A soft prompt on a loaded base: PEFT's module for it, its parameters, and the values that it starts from.

A prompt starts from embeddings of the base's vocabulary, which train better than random ones (Lester et al., "The Power of
Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021, arXiv 2104.08691), and from the same at every site: prompts that
start apart mean different things, and their mean means nothing. Only who holds the base can look them up; see
docs/decisions/first-state.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

from fedllm.errors import ModelError, explain
from fedllm.model.prompts.parts import PromptParts
from fedllm.model.prompts.tensors import ENCODER, EXPORTED, PREFIX
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
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": adapter.num_virtual_tokens}
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


def take_apart(model: PeftModel) -> None:
    """Give every tensor that travels a parameter of its own; P-tuning's network has that already."""
    encoders: Any = model.prompt_encoder
    config: Any = model.active_peft_config
    if isinstance(config, PromptEncoderConfig):
        return
    assert config.num_layers, "PEFT has filled it in"
    layers = [f"{PREFIX}{layer}" for layer in range(config.num_layers)]
    names = layers if isinstance(config, PrefixTuningConfig) else [EXPORTED]
    encoders[model.active_adapter] = PromptParts(encoders[model.active_adapter].embedding.weight, names)


def parameters(model: PeftModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the soft prompt's parameters by tensor name."""
    encoder: Any = model.prompt_encoder[model.active_adapter]
    if isinstance(encoder, PromptParts):
        yield from encoder.items()
    else:
        yield from ((f"{ENCODER}{name}", value) for name, value in encoder.named_parameters())


def first_prompt(base: LoadedBase, adapter: PromptSpec, seed: int) -> Arrays:
    """Return the embeddings that a prompt starts from, the same bits wherever the base and the seed are the same."""
    return {EXPORTED: vocabulary_rows(base, initial_ids(base, adapter, seed))}


def initial_ids(base: LoadedBase, adapter: PromptSpec, seed: int) -> NDArray[np.int64]:
    """Return the tokens [M] whose embeddings a prompt starts from.

    Raises:
        ModelError: The tokenizer makes no token of the initial text.
    """
    if not adapter.initial_text:
        known = _frequent_ids(base)
        return generator(seed, purpose=f"initial {EXPORTED}").choice(known, adapter.num_virtual_tokens)
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


def _frequent_ids(base: LoadedBase) -> NDArray[np.int64]:
    embedding: Any = base.model.get_input_embeddings()
    added = base.tokenizer.added_tokens_decoder  # special tokens and such, by id
    known = min(len(base.tokenizer), embedding.weight.shape[0])
    return np.array([token for token in range(known) if token not in added][:NUM_FREQUENT], np.int64)
