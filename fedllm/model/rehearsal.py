"""A training step on tensors without memory, to learn what the real one will need.

The model is built from its config on the ``meta`` device. Two parts are replaced by stand-ins that make and keep the same
tensors as the real ones, and compute nothing:

- a quantized linear layer makes its dense weight anew for each product, in both passes, and keeps no activation;
- a fused attention kernel keeps query, key, value, output and one number per row, and never the scores. Masks are turned
  into numbers for every layer, as `scaled_dot_product_attention` does it.

Shape legend: T targets, V vocabulary, O out, I in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional
from torch.nn.functional import cross_entropy, linear
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from fedllm.model.adapter import enable_checkpointing, wrap
from fedllm.model.allocations import LiveBytes
from fedllm.model.batch import Batch, target_logits
from fedllm.model.prompts.forward import num_virtual_tokens
from fedllm.model.quantize import COMPUTE_DTYPES, linear_names
from fedllm.model.spec import BaseSpec, ModelSpec


def empty_base(config: PretrainedConfig, spec: BaseSpec) -> PreTrainedModel:
    """Build the frozen model without memory, with stand-ins for what is quantized."""
    attention = "eager" if spec.attention == "eager" else "sdpa"
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=COMPUTE_DTYPES[spec.compute_dtype], attn_implementation=attention, trust_remote_code=False
        )
    model.tie_weights()
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def attach(model: PreTrainedModel, spec: ModelSpec) -> PeftModel:
    """Put the stand-ins and an adapter without memory on a model from :func:`empty_base`, ready to train.

    Raises:
        ModelError: The target modules are not in the model.
    """
    for name in linear_names(model) if spec.base.quantization != "none" else []:
        vars(model.get_submodule(name))["forward"] = _Dequantizing(model.get_submodule(name))
    with torch.device("meta"):
        trained = wrap(model, spec.adapter)
    if spec.base.gradient_checkpointing:
        enable_checkpointing(model)
    return trained.train()


def peak_of_step(model: PeftModel, dtype: torch.dtype, num_rows: int, length: int) -> int:
    """Return the most bytes that a forward and a backward pass hold beside parameters and optimizer.

    Args:
        model: From :func:`attach`.
        dtype: What is computed in. The ``meta`` device knows no autocast, so the adapter is turned into it for good.
        num_rows: Sequences of a micro-batch.
        length: Tokens of each, all of them targets: the worst case.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    batch = _batch(model, num_rows, length)
    with _fused_attention(), LiveBytes([*model.parameters(), *model.buffers()]) as live:
        logits = target_logits(model, batch)  # [T, V]
        loss = cross_entropy(logits.float(), batch.targets, reduction="sum")
        loss.backward()
    return int(live.peak)


def _batch(model: PeftModel, num_rows: int, length: int) -> Batch:
    """Return a batch as packing makes it at its fullest, without memory."""
    places = length + num_virtual_tokens(model)[0]
    rows = torch.zeros(num_rows, places, dtype=torch.int64, device="meta")
    targets = torch.zeros(num_rows * (length - 1), dtype=torch.int64, device="meta")
    mask = torch.ones(num_rows, 1, places, places, dtype=torch.bool, device="meta")
    virtual = rows if places > length else None
    return Batch(rows, rows, mask, targets, targets, targets, num_rows * length, virtual)


class _Dequantizing:
    """Computes a layer's product with a dense weight made for it."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = _DequantizedProduct.apply(x, self._layer.weight)  # type: ignore[no-untyped-call]
        return product if self._layer.bias is None else product + self._layer.bias.to(product.dtype)


class _DequantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight  # [O, I]
        return linear(x, x.new_empty(weight.shape))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] @ grads[0].new_empty(ctx.weight.shape), None


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Put the stand-in in the place of torch's attention, for tensors without memory only."""
    torch_functions: Any = functional
    real = torch_functions.scaled_dot_product_attention

    def stand_in(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any) -> Any:
        if not query.is_meta:
            return real(query, key, value, **settings)
        return _Attention.apply(query, key, value, settings.get("attn_mask"))  # type: ignore[no-untyped-call]

    torch_functions.scaled_dot_product_attention = stand_in
    try:
        yield
    finally:
        torch_functions.scaled_dot_product_attention = real


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        added = query.new_empty(mask.shape) if mask is not None else None
        ctx.save_for_backward(query, key, value, output, sums, added)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:  # noqa: ARG004
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
