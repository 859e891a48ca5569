"""Why nothing is ever folded into a 4-bit base: quantizing the sum again destroys what was added."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from fedllm import rng
from strategies.lowrank.product import Product
from strategies.lowrank.spectrum import recompress


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return torch.as_tensor(dequantize_4bit(codes, state))


def residual(share: float, weight: torch.Tensor) -> torch.Tensor:
    """A rank-8 matrix whose norm is a share of the weight's."""
    draw = rng.generator(0, purpose="residual")
    low = torch.from_numpy(draw.standard_normal((512, 8)) @ draw.standard_normal((8, 512))).float()
    return torch.as_tensor(low * (share * weight.norm() / low.norm()))


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()))


@pytest.fixture(scope="module")
def base() -> torch.Tensor:
    """What a site holds: a weight that went through NF4 once."""
    draw = rng.generator(1, purpose="base")
    return through_nf4(torch.from_numpy(draw.standard_normal((512, 512))).float() * 0.02)


@pytest.mark.parametrize("share", [1e-4, 1e-3, 1e-2])
def test_folding_a_residual_into_nf4_destroys_it(base: torch.Tensor, share: float) -> None:
    wanted = residual(share, base)
    applied = through_nf4(base + wanted) - base
    assert cosine(applied, wanted) < 0.1
    assert float((applied - wanted).norm() / wanted.norm()) > 0.9


@pytest.mark.parametrize("share", [1e-4, 1e-3, 1e-2])
def test_a_side_adapter_applies_the_residual_to_the_last_digit(base: torch.Tensor, share: float) -> None:
    wanted = residual(share, base)
    kept = recompress(Product(wanted.double().numpy(), np.eye(512)), 8).kept
    side_b, side_a = (torch.from_numpy(factor).float() for factor in (kept.left, kept.right))
    x = torch.from_numpy(rng.generator(2, purpose="x").standard_normal((16, 512))).float()
    found, expected = x @ side_a.T @ side_b.T, x @ wanted.T
    assert float((found - expected).norm() / expected.norm()) < 1e-6
