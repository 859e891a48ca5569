"""What local training is asked to do and what it reports, and the learning rate of every step.

The learning rate follows one schedule over the steps of *all* rounds, so a site that trains 10 steps in each of 3 rounds
sees the same rates as one that trains 30 at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedllm.errors import ConfigError, explain


@dataclass(frozen=True)
class TrainPlan:
    """What to do in one call of :func:`train`.

    Attributes:
        steps: Optimizer steps.
        first_step: Index of the first one among all steps of the federation.
        total_steps: Steps of the federation, over which the learning rate's schedule stretches.
        batch_size: Sequences in a micro-batch, at most.
        accumulation: Micro-batches in a step.
        learning_rate: Peak rate.
        optimizer: `adamw`, `sgd`, or bitsandbytes' `adamw-8bit` and `adamw-paged`, which need CUDA.
        schedule: Course of the rate after the warm-up.
        warmup_fraction: Share of all steps over which the rate rises.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Bound on the global gradient norm, 0 for none.
        compute_dtype: Arithmetic of the forward and backward pass.
        deterministic: Use deterministic kernels; equal plans, batches and thread counts then give equal bits on a CPU.
        num_threads: CPU threads, 0 for as many as there are now.
        seed: Of dropout, from :func:`fedllm.rng.derive`.
    """

    steps: int
    first_step: int
    total_steps: int
    batch_size: int
    learning_rate: float
    accumulation: int = 1
    optimizer: Literal["adamw", "adamw-8bit", "adamw-paged", "sgd"] = "adamw"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    deterministic: bool = True
    num_threads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        assert self.steps > 0, "a plan has at least one step"
        assert self.batch_size > 0
        assert self.accumulation > 0
        if not 0 <= self.first_step <= self.total_steps - self.steps:
            raise ConfigError(
                explain(
                    "a site is asked to train outside the federation's steps",
                    expected=f"steps within 0..{self.total_steps - 1}",
                    found=f"steps {self.first_step}..{self.first_step + self.steps - 1}",
                    fix="Raise num_rounds; beyond the schedule the learning rate would be zero.",
                )
            )


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did.

    Attributes:
        step: Its index among all steps of the federation.
        loss: Mean over its target tokens, before the step, in nats.
        learning_rate: The rate it took.
        grad_norm: Global gradient norm before clipping.
        num_target_tokens: Tokens predicted.
        num_tokens: Tokens computed, without padding.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_target_tokens: int
    num_tokens: int


@dataclass(frozen=True)
class TrainResult:
    """What a call of :func:`train` did.

    Attributes:
        loss_first: Loss of the first step's batch before any step.
        loss_last: Loss of the last step's batch before that step.
        loss_mean: Mean over all target tokens of all steps.
        num_steps: Optimizer steps.
        num_target_tokens: Tokens predicted.
        num_tokens: Tokens computed, without padding.
        seconds: Wall time.
        grad_norm_mean: Mean over steps of the gradient norm before clipping.
        learning_rate_last: Rate of the last step.
    """

    loss_first: float
    loss_last: float
    loss_mean: float
    num_steps: int
    num_target_tokens: int
    num_tokens: int
    seconds: float
    grad_norm_mean: float
    learning_rate_last: float


def learning_rate_at(step: int, plan: TrainPlan) -> float:
    """Return the rate of a step, by its index among all steps of the federation.

    It rises linearly over the first `W = ceil(warmup_fraction * total_steps)` steps, the first of which takes `1/W` of
    the peak and the last of which takes it all; then, with `p` the share done of what is left, cosine is
    `(1 + cos(pi p)) / 2`, linear is `1 - p`, constant is 1.
    """
    warmup = math.ceil(round(plan.warmup_fraction * plan.total_steps, 6))  # 0.07 * 100 is a little more than 7
    if step < warmup:
        return plan.learning_rate * ((step + 1) / warmup)
    progress = (step - warmup) / max(1, plan.total_steps - warmup)
    course = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
    return plan.learning_rate * course[plan.schedule]
