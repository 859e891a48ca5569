"""What torch is told before training: optimizer, seeds, threads, deterministic kernels."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from client_app.training.plan import TrainPlan
from fedllm.errors import ConfigError, explain

log = logging.getLogger(__name__)


def build_optimizer(parameters: list[nn.Parameter], plan: TrainPlan) -> torch.optim.Optimizer:
    """Return the plan's optimizer, without any state.

    Raises:
        ConfigError: It needs CUDA and the parameters are elsewhere.
    """
    rate, decay = plan.learning_rate, plan.weight_decay
    if plan.optimizer == "sgd":  # without momentum, decay in the gradient and decoupled decay are the same
        return torch.optim.SGD(parameters, rate, weight_decay=decay)
    if plan.optimizer == "adamw":
        return torch.optim.AdamW(parameters, rate, weight_decay=decay)
    if parameters[0].device.type != "cuda":
        raise ConfigError(
            explain(
                f"train.optimizer={plan.optimizer!r} needs CUDA",
                found=f"an adapter on {parameters[0].device.type!r}",
                fix="Use 'adamw'.",
            )
        )
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW32bit

    kind = AdamW8bit if plan.optimizer == "adamw-8bit" else PagedAdamW32bit
    optimizer: torch.optim.Optimizer = kind(parameters, rate, weight_decay=decay)
    return optimizer


@contextlib.contextmanager
def environment(device: torch.device, plan: TrainPlan) -> Iterator[None]:
    """Set torch's global switches for the plan, and set them back."""
    num_threads, was_deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    determinism: Any = torch.utils.deterministic
    filled = determinism.fill_uninitialized_memory
    devices = [device] if device.type == "cuda" else []
    _warn_of_emulation(device, plan)
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(plan.seed)
            if plan.num_threads:
                torch.set_num_threads(plan.num_threads)
            if plan.deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
                determinism.fill_uninitialized_memory = False  # finds bugs, and costs every allocation
                torch.use_deterministic_algorithms(True)
            yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
        determinism.fill_uninitialized_memory = filled
        torch.set_num_threads(num_threads)


def _warn_of_emulation(device: torch.device, plan: TrainPlan) -> None:
    if device.type == "cpu" and plan.compute_dtype == "bfloat16" and not _has_bfloat16():
        log.warning("this processor has no bfloat16 arithmetic; model.compute_dtype='float32' is many times faster")


def _has_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
