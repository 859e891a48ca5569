"""Frozen linear layers held in 4 or 8 bits: dense tensors to stored tensors, and stored tensors into a model.

NF4 follows Dettmers et al., QLoRA, arXiv 2305.14314: blocks of 64 weights, a 4-bit code from the quantiles of the normal
distribution, optionally with the block scales quantized to 8 bits (double quantization). int8 is one scale per output
row (absolute maximum / 127), weights only. Embeddings, norms and the output head stay as they are, and tied weights stay
tied.

Where we differ from LLM.int8 (Dettmers et al., arXiv 2208.07339): activations are not quantized. bitsandbytes computes
LLM.int8 with CUDA kernels, emulates it on a CPU in evaluation only, and leaves activations alone when training on a CPU,
so one model would answer in three ways. Ours dequantizes the weights for each product, on every device and in both modes.

Quantization runs on the CPU, so that every party holds the same weights whatever its accelerator.

Shape legend: O out, I in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from fedllm.errors import ModelError, explain
from fedllm.model.spec import BaseSpec

Tensors = dict[str, torch.Tensor]

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_NF4_BLOCK = 64
_OF_LAYER = "|"
"""Stands in a stored tensor's name between a quantized layer and its part; no module has it in its name."""


def linear_names(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that are quantized: all but the output head."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


def stored_tensors(dense: PreTrainedModel, spec: BaseSpec) -> Tensors:
    """Return what a quantized copy of a dense model consists of, by name; tied tensors once.

    Raises:
        ModelError: The model has no linear layer to quantize.
    """
    tensors = _without_twins(dense.state_dict())
    names = linear_names(dense) if spec.quantization != "none" else []
    if not names and spec.quantization != "none":
        raise ModelError(
            explain(
                f"the model has no linear layer that {spec.quantization} could hold",
                found=type(dense).__name__,
                fix="Set model.quantization to 'none'.",
            )
        )
    for name in names:
        weight = tensors.pop(f"{name}.weight")  # [O, I]
        parts = _QUANTIZERS[spec.quantization](weight, spec)
        tensors |= {f"{name}{_OF_LAYER}{part}": tensor for part, tensor in parts.items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def assemble(
    config: PretrainedConfig, tensors: Mapping[str, torch.Tensor], spec: BaseSpec, device: str
) -> PreTrainedModel:
    """Build the model around stored tensors, without initialising or copying a weight that need not move.

    Args:
        config: The model's architecture.
        tensors: From :func:`stored_tensors`.
        spec: How they are held; unquantized weights take its compute dtype.
        device: Where the model lives.

    Raises:
        ModelError: The tensors do not make up the model.
    """
    dtype = COMPUTE_DTYPES[spec.compute_dtype]
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=spec.attention, trust_remote_code=False
        )
    plain, layers = _grouped(tensors)
    for name, parts in layers.items():
        _replace_layer(model, name, parts, spec, device)
    for name, tensor in plain.items():
        _place(model, name, tensor, dtype, device)
    _finish(model, device)
    return model


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """Return the weight [O, I] that a linear layer computes with, in float32: what it holds, not what was quantized."""
    weight: Any = layer.weight
    if isinstance(layer, Linear4bit):
        return torch.as_tensor(dequantize_4bit(weight.data, weight.quant_state)).float()
    if isinstance(layer, Int8Linear):
        return torch.as_tensor(weight.data.float() * (weight.SCB / 127)[:, None])
    return torch.as_tensor(weight.data).float()


def quantized_linear(weight: torch.Tensor, spec: BaseSpec, device: str) -> nn.Module:
    """Return a linear layer without bias that holds a dense weight [O, I] as the spec says, on a device."""
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    parts = _QUANTIZERS[spec.quantization](weight, spec)
    return _LAYERS[spec.quantization](dense, parts, COMPUTE_DTYPES[spec.compute_dtype], device)


def _without_twins(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Keep the first name of tensors that share their memory (tied weights)."""
    first: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in tensors.items():
        first.setdefault((tensor.data_ptr(), tensor.shape), name)
    return {name: tensors[name] for name in first.values()}


def _to_nf4(weight: torch.Tensor, spec: BaseSpec) -> Tensors:
    codes, state = quantize_4bit(
        weight, blocksize=_NF4_BLOCK, compress_statistics=spec.double_quantization, quant_type="nf4"
    )
    return {"codes": codes, **state.as_dict(packed=True)}


def _to_int8(weight: torch.Tensor, _: BaseSpec) -> Tensors:
    scales = weight.float().abs().amax(dim=1)  # [O]
    codes = torch.round(weight.float() * (127 / scales.clamp_min(1e-30))[:, None])
    return {"codes": codes.to(torch.int8), "scales": scales}


_QUANTIZERS: dict[str, Callable[[torch.Tensor, BaseSpec], Tensors]] = {"nf4": _to_nf4, "int8": _to_int8}


def _grouped(tensors: Mapping[str, torch.Tensor]) -> tuple[Tensors, dict[str, Tensors]]:
    """Split stored tensors into plain ones and the parts of each quantized layer."""
    plain: Tensors = {}
    layers: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        layer, is_part, part = name.partition(_OF_LAYER)
        (layers.setdefault(layer, {}) if is_part else plain)[part or layer] = tensor
    return plain, layers


def _replace_layer(model: PreTrainedModel, name: str, parts: Tensors, spec: BaseSpec, device: str) -> None:
    """Put a quantized layer in a dense layer's place."""
    try:
        old = model.get_submodule(name)
        model.set_submodule(name, _LAYERS[spec.quantization](old, parts, COMPUTE_DTYPES[spec.compute_dtype], device))
    except (AttributeError, KeyError) as error:
        raise ModelError(explain("a stored base does not fit its architecture", found=error, where=name)) from error


def _nf4_layer(old: Any, parts: Tensors, dtype: torch.dtype, device: str) -> nn.Module:
    with torch.device("meta"):
        layer = Linear4bit(old.in_features, old.out_features, old.bias is not None, dtype, quant_type="nf4")
    # On processors with AVX512-BF16 the layer would repack its weight on the first evaluation, for good, into a form that
    # is computed in bfloat16 and has no backward pass.
    layer.support_avx512bf16_for_cpu = False
    statistics = {part: tensor for part, tensor in parts.items() if part != "codes"}
    layer.weight = Params4bit.from_prequantized(parts["codes"], statistics, device=device, module=layer)
    layer.weight.quant_state.dtype = dtype  # what the backward pass dequantizes to; the forward pass follows its input
    return layer


def _int8_layer(old: Any, parts: Tensors, _: torch.dtype, device: str) -> nn.Module:
    with torch.device("meta"):
        layer = Int8Linear(old.in_features, old.out_features, old.bias is not None, has_fp16_weights=False)
    codes, scales = parts["codes"].to(device), parts["scales"].to(device)
    layer.weight = Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    return layer


_LAYERS: dict[str, Callable[[Any, Tensors, torch.dtype, str], nn.Module]] = {
    "nf4": _nf4_layer,
    "int8": _int8_layer,
}


class Int8Linear(Linear8bitLt):
    """A linear layer with int8 weights [O, I] and one scale per row, dequantized for each product.

    It is a `Linear8bitLt` so that PEFT puts its int8 adapter around it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x W^T + b`."""
        weight: Any = self.weight
        product: torch.Tensor = _Int8Product.apply(x, weight.data, weight.SCB / 127)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _Int8Product(torch.autograd.Function):
    """`x (unit * codes)^T`: the scale is per row of the weight, so it is applied to the product, in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codes: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(codes, unit)
        product = nn.functional.linear(x, codes.to(x.dtype))
        return (product * unit).to(product.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        codes, unit = ctx.saved_tensors
        scaled = (grads[0] * unit).to(grads[0].dtype)
        return scaled @ codes.to(scaled.dtype), None, None


def _place(model: PreTrainedModel, name: str, tensor: torch.Tensor, dtype: torch.dtype, device: str) -> None:
    """Put a tensor where the model has a parameter (which takes the dtype) or a buffer (which keeps its own)."""
    owner_name, _, attribute = name.rpartition(".")
    try:
        owner = model.get_submodule(owner_name)
        old = getattr(owner, attribute)
    except AttributeError as error:
        raise ModelError(explain("a stored base holds a tensor that the model lacks", found=name)) from error
    if old.shape != tensor.shape:
        found = tuple(tensor.shape)
        raise ModelError(
            explain("a stored tensor has another shape", expected=tuple(old.shape), found=found, where=name)
        )
    if isinstance(old, nn.Parameter):
        setattr(owner, attribute, nn.Parameter(tensor.to(device, dtype), requires_grad=False))
    else:
        setattr(owner, attribute, tensor.to(device))


def _finish(model: PreTrainedModel, device: str) -> None:
    """Tie what is tied, move what the architecture computes for itself, and make sure that nothing is missing."""
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    missing = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if missing:
        raise ModelError(explain("a stored base lacks tensors", found=", ".join(missing[:3])))
    model.requires_grad_(False)
    model.config.use_cache = False
    kinds = {type(module) for module in model.modules()}
    vars(model).update(
        is_loaded_in_4bit=Linear4bit in kinds, is_loaded_in_8bit=Int8Linear in kinds
    )  # PEFT asks for these
    model.eval()
