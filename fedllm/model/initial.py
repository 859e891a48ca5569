"""The adapter that a federation starts from, drawn by the server without the base model.

- LoRA, as in PEFT: ``A`` is Kaiming-uniform with ``a = sqrt(5)``, which is uniform in ``[-1/sqrt(I), 1/sqrt(I)]``, and
  ``B`` is zero, so the first global model is the base itself. (He et al., Delving Deep into Rectifiers,
  arXiv 1502.01852.) A matrix between them is the unit matrix.
- Heads have fixed factors of normal entries whose rows (A) and columns (B) have length 1 on average, and zero matrices
  between them. In high dimensions such rows are orthogonal but for `1/sqrt(I)`; a decomposition that made them exactly so
  would give other last bits on other machines.
- A prefix is normal with a small deviation: keys that no query prefers, values that add little. PEFT's own draws of
  deviation 1 drown the base.
- P-tuning, as in PEFT: standard normal embeddings into a network whose weights are uniform as LoRA's ``A``. Biases are
  zero, where PEFT draws them too, because their bound is not in their own shape.

A prompt in the embedding space starts from the base's vocabulary (:mod:`fedllm.model.prompts.attach`), so there is no rule
for it here.

Shape legend: R rank, I in, O out, M virtual tokens, H hidden size, D width of one layer's keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import LayoutError, explain
from fedllm.rng import generator
from fedllm.update import Arrays, Layout, TensorSpec
from fedllm.work import CONTROL

Rule = Callable[[TensorSpec, np.random.Generator], NDArray[np.float32]]

PREFIX_DEVIATION = 0.02
"""Standard deviation of a prefix's first keys and values."""


def initial_arrays(layout: Layout, seed: int) -> Arrays:
    """Draw the first global adapter; each tensor's draw depends on the seed and its name only.

    Args:
        layout: Tensors of role `lora_A` and `personal_A` [R, I], `lora_B` and `personal_B` [O, R] and `control`, which is
            zero; those with heads (:mod:`fedllm.lora.heads`); `prefix` and `personal_prefix` [M, 2 D], `encoder_input`
            [M, H] and `encoder` [O, I] or [O].
        seed: The run's seed.

    Raises:
        LayoutError: A tensor has a role for which there is no rule.
    """
    return {spec.name: _initial(spec, seed) for spec in layout.tensors}


def drawn_arrays(layout: Layout, seed: int) -> Arrays:
    """Draw the first values of those tensors for which there is a rule; the others start from the base."""
    return {spec.name: _initial(spec, seed) for spec in layout.tensors if _rule(spec)}


def can_be_drawn(layout: Layout) -> bool:
    """Tell whether :func:`initial_arrays` has a rule for every tensor."""
    return all(_rule(spec) for spec in layout.tensors)


def _initial(spec: TensorSpec, seed: int) -> NDArray[np.float32]:
    rule = _rule(spec)
    if rule is None:
        known = ", ".join(f"{role} with {dims} dimensions" for role, dims in _RULES)
        raise LayoutError(explain("no rule for a tensor's first values", expected=f"one of {known}", found=spec))
    return rule(spec, generator(seed, purpose=f"initial {spec.name}"))


def _rule(spec: TensorSpec) -> Rule | None:
    return _zeros if spec.role == CONTROL else _RULES.get((spec.role, len(spec.shape)))


def _zeros(spec: TensorSpec, _: np.random.Generator) -> NDArray[np.float32]:
    return np.zeros(spec.shape, np.float32)


def _uniform(spec: TensorSpec, draw: np.random.Generator) -> NDArray[np.float32]:
    bound = 1 / math.sqrt(spec.shape[1])
    draws = draw.random(spec.shape, np.float32)  # [O, I] in [0, 1)
    return (draws * np.float32(2) - np.float32(1)) * np.float32(bound)


def _normal(spec: TensorSpec, draw: np.random.Generator) -> NDArray[np.float32]:
    return draw.standard_normal(spec.shape, np.float32)


def _small(spec: TensorSpec, draw: np.random.Generator) -> NDArray[np.float32]:
    return np.float32(PREFIX_DEVIATION) * _normal(spec, draw)


def _unit(spec: TensorSpec, _: np.random.Generator) -> NDArray[np.float32]:
    return np.broadcast_to(np.eye(spec.shape[-1], dtype=np.float32), spec.shape).copy()


def _unit_rows(spec: TensorSpec, draw: np.random.Generator) -> NDArray[np.float32]:
    return _normal(spec, draw) / np.float32(math.sqrt(spec.shape[1]))


def _unit_columns(spec: TensorSpec, draw: np.random.Generator) -> NDArray[np.float32]:
    return _normal(spec, draw) / np.float32(math.sqrt(spec.shape[0]))


_RULES: dict[tuple[str, int], Rule] = {
    ("lora_A", 2): _uniform,
    ("lora_B", 2): _zeros,
    ("personal_A", 2): _uniform,
    ("personal_B", 2): _zeros,
    ("lora_M", 3): _unit,
    ("head_A", 2): _unit_rows,
    ("head_B", 2): _unit_columns,
    ("head_M", 3): _zeros,
    ("side_A", 2): _zeros,
    ("side_B", 2): _zeros,
    ("prefix", 2): _small,
    ("personal_prefix", 2): _small,
    ("encoder_input", 2): _normal,
    ("encoder", 2): _uniform,
    ("encoder", 1): _zeros,
}
"""Rules by role and number of dimensions."""
