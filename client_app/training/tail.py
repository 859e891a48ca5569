"""HetLoRA's local objective: a site's last components are pushed towards zero, and given up where they shrank.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024, arXiv 2401.06432: a
site of rank r minimises ``f(B, A) + lambda |B[:, q:]| |A[q:]|`` with Frobenius norms and q = gamma r, and goes on with
rank q if the tail ``|B[:, q:]| |A[q:]|`` is smaller after its steps than it was before. Where we differ: a site has one
rank for all layers, so the tail is the sum over its layers. Its gradient is taken as zero where a norm is zero, as B's is
at the start; q is rounded down, and never less than the operator allows.

Shape legend: O out, I in, r rank, q components that are not in the tail.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn


class TailPenalty:
    """Adds the penalty's gradient to every step, before it is clipped, and compares the tail before and after.

    Args:
        first: q, where the tail begins.
        strength: lambda.
    """

    def __init__(self, first: int, strength: float) -> None:
        self.first, self._strength = first, strength
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        self._before = 0.0

    def begin(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the trained parameters by tensor name; they hold the received values."""
        names = [name for name in parameters if ".lora_A." in name]
        self._pairs = [(parameters[name.replace(".lora_A.", ".lora_B.")], parameters[name]) for name in names]
        self._before = self._tail()

    @torch.no_grad()
    def pull(self) -> None:
        """Add the penalty's gradient; to be called before clipping."""
        for b, a, norm_b, norm_a in self._norms():
            if not (norm_b and norm_a):
                continue
            for tail, slope in ((b, norm_a / norm_b), (a, norm_b / norm_a)):
                assert tail.grad is not None, "every trained tensor has a gradient"
                own = self._of(tail, is_b=tail is b)
                self._of(tail.grad, is_b=tail is b).add_(own, alpha=self._strength * slope)

    def correct(self, rate: float) -> None:
        """Leave clipped gradients as they are."""

    @property
    def shrank(self) -> bool:
        """Whether the tail is smaller now than it was at the start."""
        return self._tail() < self._before

    @torch.no_grad()
    def _tail(self) -> float:
        return sum(norm_b * norm_a for _, _, norm_b, norm_a in self._norms())

    def _norms(self) -> Iterator[tuple[nn.Parameter, nn.Parameter, float, float]]:
        for b, a in self._pairs:
            norm_b, norm_a = (float(self._of(one, is_b=one is b).double().norm()) for one in (b, a))
            yield b, a, norm_b, norm_a

    def _of(self, tensor: torch.Tensor, *, is_b: bool) -> torch.Tensor:
        """Return the tail of B [O, r] or of A [r, I]."""
        return tensor[:, self.first :] if is_b else tensor[self.first :]
