"""Soft prompts of every kind with values that matter, for tests."""

from __future__ import annotations

import numpy as np
from peft import PeftModel

from fedllm.model.build import LoadedBase, attach_adapter, layout_of, write_adapter
from fedllm.model.spec import PrefixSpec, PromptSpec, PtuningSpec, SoftPromptSpec
from fedllm.rng import generator
from fedllm.update import Arrays, Layout

NUM_TOKENS = 3
KINDS: dict[str, SoftPromptSpec] = {
    "prompt": PromptSpec(num_virtual_tokens=NUM_TOKENS),
    "prefix": PrefixSpec(num_virtual_tokens=NUM_TOKENS),
    "ptuning": PtuningSpec(num_virtual_tokens=NUM_TOKENS, encoder_hidden_size=24),
}


def random_arrays(layout: Layout, seed: int = 1) -> Arrays:
    """Draw values of about the size of the tiny model's embeddings."""
    return {
        spec.name: generator(seed, purpose=spec.name).standard_normal(spec.shape, np.float32) * np.float32(0.4)
        for spec in layout.tensors
    }


def with_prompt(base: LoadedBase, adapter: SoftPromptSpec, seed: int = 1) -> PeftModel:
    """Attach a soft prompt with random values."""
    model = attach_adapter(base, adapter)
    layout = layout_of(model)
    write_adapter(model, layout, random_arrays(layout, seed))
    return model
