"""Square matrices between LoRA's two factors: the layer computes `base(x) + s B M A x` with M [H, r, r], one block a head.

Down-projection and matrices together are one module in PEFT's place for A, so PEFT's own forward pass stays as it is. With
several heads each has a gain beside its matrix, which sites train and fold into it before they hand it in
(Ravan, arXiv 2506.05568); with one there is none.

Shape legend: H heads, r rank of a head, R = H r, I in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

MIDDLE = "lora_M"
"""Role of the matrices where B and A start as LoRA's, and the last part of their module's name."""

_NAME = "middle"


class Headed(nn.Linear):
    """A [R, I] and the heads' matrices [H, r, r].

    Args:
        plain: What it takes the place of.
        num_heads: H, a divisor of R.
    """

    def __init__(self, plain: nn.Linear, num_heads: int) -> None:
        super().__init__(1, 1, bias=False)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight = plain.weight
        rank = plain.out_features // num_heads
        self.middle = nn.Parameter(torch.zeros(num_heads, rank, rank, device=plain.weight.device))
        self.gains = nn.Parameter(torch.ones(num_heads, device=plain.weight.device)) if num_heads > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `M A x`, head by head."""
        num_heads, rank, _ = self.middle.shape
        heads = super().forward(x).unflatten(-1, (num_heads, rank))
        mixed = torch.einsum("...hi,hoi->...ho", heads, self.middle.to(heads.dtype))
        if self.gains is not None:
            mixed = mixed * self.gains[:, None].to(heads.dtype)
        return mixed.flatten(-2)


def put_heads(model: nn.Module, num_heads: int, adapter: str) -> None:
    """Put matrices between the factors of every adapted layer.

    Args:
        model: With its LoRA adapter.
        num_heads: H.
        adapter: PEFT's name of it.
    """
    for module in list(model.modules()):
        downs: Any = getattr(module, "lora_A", None)
        if isinstance(downs, nn.ModuleDict) and adapter in downs:
            downs[adapter] = Headed(downs[adapter], num_heads)  # type: ignore[arg-type]


def has_several_heads(model: nn.Module) -> bool:
    """Tell whether layers have more than one head."""
    return any(True for _ in _gains(model))


def gains_of(model: nn.Module) -> list[nn.Parameter]:
    """Return the heads' gains, of all layers."""
    return [gains for _, gains in _gains(model)]


def fold_gains(model: nn.Module) -> None:
    """Multiply the gains into the matrices and make them 1; the model computes the same."""
    with torch.no_grad():
        for headed, gains in _gains(model):
            headed.middle.mul_(gains[:, None, None])
            gains.fill_(1.0)


def tensor_name(name: str) -> str:
    """Return a parameter's name in a layout, by its name in the model without the adapter's own."""
    return name.replace(f".lora_A.{_NAME}", f".{MIDDLE}.weight")


def _gains(model: nn.Module) -> Iterator[tuple[Headed, nn.Parameter]]:
    for module in model.modules():
        if isinstance(module, Headed) and module.gains is not None:
            yield module, module.gains
