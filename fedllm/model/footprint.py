"""How much memory local training needs, from a base's config alone.

::

    peak = base + adapter + optimizer + step + reserve

``base``, ``adapter`` and ``optimizer`` are counted tensor by tensor. ``step`` (activations, gradients, logits, passing
copies of quantized weights) is found by rehearsing one step without memory (:mod:`fedllm.model.rehearsal`), so gradient
checkpointing, soft prompts and architectures other than Llama's need no formula of their own.

``reserve`` is what an allocator keeps of freed blocks: glibc kept 170 and 180 MB where steps of SmolLM2-135M (2 sequences
of 128 tokens, without and with checkpointing) needed 470 and 217 MB; never more than a step had, so the smaller of the
two is taken. What is not in the sum: the libraries themselves, and a CUDA context (about half a gigabyte).

NF4 stores a weight of n numbers in n/2 bytes, one scale for every 64 of them (four bytes, or one byte with double
quantization, and then four bytes for every 256 scales), and two small tables (Dettmers et al., arXiv 2305.14314).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil

import torch
from torch import nn
from transformers import PretrainedConfig

from fedllm.errors import ModelError, explain
from fedllm.model.quantize import COMPUTE_DTYPES, linear_names
from fedllm.model.rehearsal import attach, empty_base, peak_of_step
from fedllm.model.spec import BaseSpec, ModelSpec

RESERVE_BYTES = 160_000_000


@dataclass(frozen=True)
class Footprint:
    """Bytes that training needs on its device.

    Attributes:
        base: The frozen weights as they are held.
        adapter: What is trained.
        optimizer: Its state.
        step: The most that one micro-batch adds to them.
    """

    base: int
    adapter: int
    optimizer: int
    step: int

    @property
    def reserve(self) -> int:
        """What an allocator keeps of blocks that were freed."""
        return min(self.step, RESERVE_BYTES)

    @property
    def peak(self) -> int:
        """All of it."""
        return self.base + self.adapter + self.optimizer + self.step + self.reserve


def estimate(
    config: PretrainedConfig, spec: ModelSpec, *, batch_size: int, max_length: int, optimizer: str = "adamw"
) -> Footprint:
    """Estimate what training needs.

    Args:
        config: The base's architecture.
        spec: How it is held and what is trained on it.
        batch_size: Sequences in a micro-batch.
        max_length: Tokens in a sequence.
        optimizer: As in the run config.

    Raises:
        ModelError: The architecture does something that cannot be rehearsed, such as choosing by the data.
    """
    try:
        model = empty_base(config, spec.base)
        base = _base_bytes(model, spec.base)
        trained = attach(model, spec)
        num_trained = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
        step = peak_of_step(trained, COMPUTE_DTYPES[spec.base.compute_dtype], batch_size, max_length)
    except _FOREIGN_ERRORS as error:
        found = f"{type(error).__name__}: {error}".splitlines()[0]
        problem = f"the memory of {config.model_type!r} cannot be estimated"
        raise ModelError(explain(problem, found=found)) from error
    return Footprint(base, 4 * num_trained, ceil(_STATE_BYTES[optimizer] * num_trained), step)


_FOREIGN_ERRORS = (RuntimeError, TypeError, AttributeError, KeyError, IndexError, ImportError)
_STATE_BYTES = {"adamw": 8.0, "adamw-paged": 8.0, "adamw-8bit": 2.0 + 2 * 4 / 256, "sgd": 0.0}
"""Optimizer state per trained number: two moments, of four bytes or of one byte and a scale for every 256."""


def _base_bytes(model: nn.Module, spec: BaseSpec) -> int:
    quantized = {f"{name}.weight" for name in linear_names(model)} if spec.quantization != "none" else set()
    weights = dict(model.named_parameters())  # tied ones once
    plain = [tensor for name, tensor in weights.items() if name not in quantized]
    held = sum(_HELD[spec.quantization](weights[name], spec) for name in quantized)
    return held + _bytes([*plain, *model.buffers()])


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _nf4_bytes(weight: torch.Tensor, spec: BaseSpec) -> int:
    blocks = ceil(weight.numel() / 64)
    scales = blocks + 4 * ceil(blocks / 256) + 4 * 256 if spec.double_quantization else 4 * blocks
    return ceil(weight.numel() / 2) + scales + 4 * 16


def _int8_bytes(weight: torch.Tensor, _: BaseSpec) -> int:
    return weight.numel() + 4 * weight.shape[0]


_HELD: dict[str, Callable[[torch.Tensor, BaseSpec], int]] = {"nf4": _nf4_bytes, "int8": _int8_bytes}
