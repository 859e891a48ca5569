"""A base and a LoRA adapter as one dense model that needs neither PEFT nor bitsandbytes.

What is merged is the base that was trained on: its quantized weights as they are multiplied with, not those that they were
quantized from, so the merged model computes what training and evaluation saw, up to the rounding of its dtype. Weights are
written dense. Quantizing them again, as PEFT does where it merges into 4-bit layers, would round the adapter away.

Shape legend: O out, I in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedllm.errors import ModelError, explain
from fedllm.lora.pairs import pairs_of
from fedllm.model.adapter import detach_adapter
from fedllm.model.build import LoadedBase
from fedllm.model.quantize import dense_weight, linear_names
from fedllm.model.spec import LoraSpec
from fedllm.update import Arrays, Layout, check_arrays

Dtype = Literal["float32", "bfloat16", "float16"]
_PREFIX = "base_model.model."


def save_merged(
    folder: Path, base: LoadedBase, adapter: LoraSpec, layout: Layout, arrays: Arrays, dtype: Dtype = "bfloat16"
) -> None:
    """Write the merged model and its tokenizer as a transformers folder.

    Args:
        folder: Where; made if missing.
        base: The base; an adapter that it carries is taken off.
        adapter: Scale and side factors of the adapter.
        layout: The adapter's layout.
        arrays: Its values.
        dtype: Of the written weights.

    Raises:
        LayoutError: The arrays do not fit the layout.
        ModelError: The adapter is of another model.
    """
    check_arrays(arrays, layout, "the adapter to merge")
    detach_adapter(base)
    tensors = _tensors(base.model, _added(adapter, layout, arrays))
    merged: PreTrainedModel = AutoModelForCausalLM.from_config(base.model.config, dtype=getattr(torch, dtype))
    absent = [name for name in merged.load_state_dict(tensors, strict=False).missing_keys if not _is_tied(name, merged)]
    assert not absent, f"the merged model lacks {absent[:3]}"
    merged.generation_config = base.model.generation_config
    merged.config.use_cache = True
    merged.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)


def _added(adapter: LoraSpec, layout: Layout, arrays: Arrays) -> dict[str, torch.Tensor]:
    """Return what the adapter adds to each layer's weight [O, I], in float32."""
    added = {}
    for pair in pairs_of(layout):
        total = np.float32(adapter.scale) * arrays[pair.b.name] @ arrays[pair.a.name]
        if pair.side_rank:
            total += arrays[pair.side_b] @ arrays[pair.side_a]
        added[pair.layer.removeprefix(_PREFIX)] = torch.from_numpy(total)
    return added


def _tensors(model: PreTrainedModel, added: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return every weight of the merged model, float32 where it was quantized or added to."""
    layers = {name: model.get_submodule(name) for name in linear_names(model)}
    if unknown := sorted(added.keys() - layers.keys()):
        raise ModelError(
            explain("the adapter is of another model", expected=f"layers of {type(model).__name__}", found=unknown[0])
        )
    weights = {name: dense_weight(layer).cpu() for name, layer in layers.items()}
    tensors = {f"{name}.weight": weight + added.get(name, 0) for name, weight in weights.items()}
    others = {name: value.detach().cpu() for name, value in model.named_parameters() if name not in tensors}
    return tensors | others


def _is_tied(name: str, model: PreTrainedModel) -> bool:
    """Tell whether a tensor is another one under a second name, such as the head that shares the embedding."""
    tensors = model.state_dict()
    return bool(sum(tensor.data_ptr() == tensors[name].data_ptr() for tensor in tensors.values()) > 1)
