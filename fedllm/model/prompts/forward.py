"""Virtual tokens in the forward pass, for packed and padded batches alike.

PEFT puts a prompt before each *row* and ignores positions and masks; a row that holds several examples would show the
prompt to the first and all others to each other. Here every example has its own: a prompt's places are part of the batch
(:mod:`fedllm.model.batch`), and this module fills them. A prefix is not in the sequence but in the cache, where all
examples of a row can share it, since its keys carry no position.

On rows of one example the results are PEFT's.

Shape legend: B sequences, L places of the longest one, M virtual tokens, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, PrefixTuningConfig
from torch import nn

from fedllm.model.prompts.attach import is_soft_prompt


def num_virtual_tokens(model: nn.Module) -> tuple[int, int]:
    """Return how many virtual tokens come before every example: in the sequence, and in the cache.

    Both are 0 without a soft prompt, and while it is off (:func:`fedllm.model.generate.without_adapter`).
    """
    if not isinstance(model, PeftModel) or not is_soft_prompt(model) or not model.has_active_enabled_adapter:
        return 0, 0
    config: Any = model.active_peft_config
    is_cached = isinstance(config, PrefixTuningConfig)
    return (0, config.num_virtual_tokens) if is_cached else (config.num_virtual_tokens, 0)


def embeddings(model: PeftModel, input_ids: torch.Tensor, virtual: torch.Tensor) -> torch.Tensor:
    """Return the embeddings [B, L, H] of a batch with the prompt at its places.

    Args:
        model: With a prompt.
        input_ids: int64 [B, L]; what stands at a virtual place does not matter.
        virtual: int64 [B, L], number of the virtual token at a place, -1 where there is a real one.
    """
    embedding: Any = model.get_base_model().get_input_embeddings()  # type: ignore[operator]
    embedded: torch.Tensor = embedding(input_ids)
    prompt: torch.Tensor = model.get_prompt(batch_size=1)[0].to(embedded.dtype)  # [M, H]
    return torch.where((virtual >= 0)[..., None], prompt[virtual.clamp(min=0)], embedded)


def cached(model: PeftModel, position_ids: torch.Tensor, mask: torch.Tensor | None, num_tokens: int) -> dict[str, Any]:
    """Return what makes a model see its prefix before every example of a batch.

    Args:
        model: With a prefix.
        position_ids: int64 [B, L], from 0 in each example.
        mask: [B, 1, L, L] or None, as in a batch.
        num_tokens: M.
    """
    if mask is not None:
        visible = torch.ones((), dtype=torch.bool) if mask.dtype == torch.bool else torch.zeros((), dtype=mask.dtype)
        prefix = visible.to(mask.device).expand(*mask.shape[:-1], num_tokens)
        mask = torch.cat((prefix, mask), dim=-1)  # [B, 1, L, M + L]
    cache = model.get_prompt(batch_size=len(position_ids))
    return {"past_key_values": cache, "position_ids": position_ids + num_tokens, "attention_mask": mask}
