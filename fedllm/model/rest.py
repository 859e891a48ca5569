"""The frozen adapter beside the trained one: what a site applies without training it.

It holds the side factors and the components that a site of smaller rank does not train (:mod:`fedllm.lora.cut`), as a
second LoRA adapter of PEFT in float32 with scale 1. The layer then computes `base(x) + s_k B_k A_k x + rest(x)`, and the
quantized base stays as it is: adding to NF4 weights and quantizing again would destroy what was added.

Shape legend: O out, I in, Q rank of the frozen adapter at a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel

TRAINED, REST = "default", "rest"
_PREFIX = "base_model.model."


def attach_rest(model: PeftModel, ranks: Mapping[str, int]) -> None:
    """Put a frozen adapter beside the trained one, in place of another that is there; zero until written.

    Args:
        model: With its trained adapter.
        ranks: Q by layer, of all adapted layers; empty or all zero for none.
    """
    wanted = {layer.removeprefix(_PREFIX): rank for layer, rank in ranks.items() if rank}
    if REST in model.peft_config:
        if getattr(model.peft_config[REST], "rank_pattern", None) == wanted:
            return
        model.delete_adapter(REST)
    if wanted:
        model.add_adapter(REST, _config(model, wanted))
    tuner: Any = model.base_model
    tuner.set_adapter([TRAINED, REST] if wanted else TRAINED)
    for name, parameter in model.named_parameters():
        if f".{REST}." in name:
            parameter.requires_grad_(False)
            parameter.data = torch.zeros_like(parameter, dtype=torch.float32)


def write_rest(model: PeftModel, factors: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]) -> None:
    """Write `(B, A)` [O, Q], [Q, I] by layer into the frozen adapter.

    Args:
        model: After :func:`attach_rest`.
        factors: In the shapes that it was given.
    """
    with torch.no_grad():
        for layer, (b, a) in factors.items():
            module: Any = model.get_submodule(layer)
            for weight, values in ((module.lora_B[REST].weight, b), (module.lora_A[REST].weight, a)):
                assert tuple(weight.shape) == values.shape, f"{layer}: {tuple(weight.shape)} for {values.shape}"
                weight.copy_(torch.from_numpy(np.ascontiguousarray(values)))


def _config(model: PeftModel, ranks: Mapping[str, int]) -> LoraConfig:
    trained: Any = model.peft_config[TRAINED]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        lora_dropout=0.0,
        target_modules=trained.target_modules,
        rank_pattern=dict(ranks),
        alpha_pattern=dict(ranks),
    )
