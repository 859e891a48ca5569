"""Answer a prompt with a model, with or without its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase


def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, system: str | None = None
) -> str:
    """Return the model's greedy answer to one prompt, through the tokenizer's chat template.

    Args:
        model: A causal language model, or PEFT's wrapper around one.
        tokenizer: With chat template.
        prompt: What the user says.
        max_new_tokens: Length of the answer at most, in tokens.
        system: A system message to put before it.
    """
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    inputs: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    inputs = inputs.to(next(model.parameters()).device)
    model.eval()
    with torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
    text: Any = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text).strip()


@contextmanager
def without_adapter(model: PeftModel) -> Iterator[None]:
    """Let a model compute what its base computes."""
    with model.disable_adapter():
        yield
