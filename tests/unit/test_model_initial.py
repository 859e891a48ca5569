"""The first global adapter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedllm.errors import LayoutError
from fedllm.model.initial import initial_arrays
from fedllm.update import Layout, TensorSpec, check_arrays

LAYOUT = Layout(
    (
        TensorSpec("x.lora_A.weight", (16, 576), role="lora_A"),
        TensorSpec("x.lora_B.weight", (192, 16), role="lora_B"),
        TensorSpec("y.lora_A.weight", (16, 576), role="lora_A"),
    )
)


def test_a_is_uniform_within_pefts_bound_and_b_is_zero() -> None:
    arrays = initial_arrays(LAYOUT, 7)
    check_arrays(arrays, LAYOUT, "test")
    a, bound = arrays["x.lora_A.weight"], 1 / math.sqrt(576)
    reference = torch.empty(16, 576)
    torch.nn.init.kaiming_uniform_(reference, a=math.sqrt(5))
    assert not arrays["x.lora_B.weight"].any()
    assert 0.99 * bound < np.abs(a).max() <= bound * (1 + 1e-6)
    assert 0.99 * bound < float(reference.abs().max()) <= bound * (1 + 1e-6), "PEFT's rule has another bound"
    # 9,216 draws: the mean's standard error is 0.006 bounds, the variance's 0.01 of a uniform's
    assert abs(a.mean()) < 0.03 * bound
    assert abs(a.var() / (bound**2 / 3) - 1) < 0.05
    deciles = np.histogram(a, bins=10, range=(-bound, bound))[0]
    assert deciles.min() > 0.85 * a.size / 10


def test_a_draw_depends_on_seed_and_name_only() -> None:
    arrays = initial_arrays(LAYOUT, 7)
    alone = initial_arrays(Layout(LAYOUT.tensors[2:]), 7)
    np.testing.assert_array_equal(arrays["y.lora_A.weight"], alone["y.lora_A.weight"])
    assert not np.array_equal(arrays["x.lora_A.weight"], arrays["y.lora_A.weight"])
    assert not np.array_equal(arrays["x.lora_A.weight"], initial_arrays(LAYOUT, 8)["x.lora_A.weight"])


@pytest.mark.parametrize("spec", [TensorSpec("p", (4, 8)), TensorSpec("a", (4,), role="lora_A")])
def test_a_tensor_without_a_rule_is_refused(spec: TensorSpec) -> None:
    with pytest.raises(LayoutError, match="no rule"):
        initial_arrays(Layout((spec,)), 1)
