"""The adapter that a federation starts from, drawn by the server without the base model.

As PEFT does, ``A`` is Kaiming-uniform with ``a = sqrt(5)``, which is uniform in ``[-1/sqrt(I), 1/sqrt(I)]``, and ``B`` is
zero, so the first global model is the base itself. (He et al., Delving Deep into Rectifiers, arXiv 1502.01852.)

Shape legend: R rank, I in, O out.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import LayoutError, explain
from fedllm.rng import generator
from fedllm.update import Arrays, Layout, TensorSpec
from fedllm.work import CONTROL


def initial_arrays(layout: Layout, seed: int) -> Arrays:
    """Draw the first global adapter; each tensor's draw depends on the seed and its name only.

    Args:
        layout: Tensors of role `lora_A` [R, I], `lora_B` [O, R] and `control`, which is zero.
        seed: The run's seed.

    Raises:
        LayoutError: A tensor has a role for which there is no rule.
    """
    return {spec.name: _initial(spec, seed) for spec in layout.tensors}


def _initial(spec: TensorSpec, seed: int) -> NDArray[np.float32]:
    if spec.role in ("lora_B", CONTROL):
        return np.zeros(spec.shape, np.float32)
    if spec.role == "lora_A" and len(spec.shape) == 2:
        bound = 1 / math.sqrt(spec.shape[1])
        draws = generator(seed, purpose=f"initial {spec.name}").random(spec.shape, np.float32)  # [R, I] in [0, 1)
        return (draws * np.float32(2) - np.float32(1)) * np.float32(bound)
    raise LayoutError(
        explain("no rule for a tensor's first values", expected="role lora_A [R, I] or lora_B [O, R]", found=spec)
    )
