"""Answer a prompt with a model, to show people what training changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase


def answer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    system: str | None = None,
    around: Callable[[torch.Tensor], AbstractContextManager[None]] | None = None,
) -> str:
    """Return the model's greedy answer to a question, without special tokens.

    Args:
        model: With its adapter on, or inside :func:`without_adapter`.
        tokenizer: With a chat template.
        prompt: The user's message.
        max_new_tokens: Length of the answer.
        system: A system message before it; None for the template's own default.
        around: Sets the model up for the question's tokens [1, L]; None for nothing.
    """
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    encoded: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    inputs = encoded.to(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    try:
        mode = around(inputs["input_ids"]) if around else nullcontext()
        with mode, torch.inference_mode(), warnings.catch_warnings():
            # PEFT's prompts count positions themselves, and say so.
            warnings.filterwarnings("ignore", "Position ids are not supported", UserWarning)
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                generation_config=_greedy(model, tokenizer, max_new_tokens),
            )
    finally:
        model.train(was_training)
    new = output[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


def without_adapter(model: PeftModel) -> AbstractContextManager[None]:
    """Return a context in which the model computes what its base computes."""
    context: AbstractContextManager[None] = model.disable_adapter()
    return context


def _greedy(model: PeftModel, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Decode greedily, until any token that ends a turn; a model may name several."""
    base: Any = model.get_base_model()
    own = base.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
    )
