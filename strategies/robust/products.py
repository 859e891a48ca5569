"""Updates of LoRA layers compared by what they change in the model: the products, not the factors.

`B A = (B T)(T^-1 A)` for every invertible T, so two sites that learned the same can hold factors that look far apart, and a
rule that judges factors takes honest sites for liars. What a site changes in a layer is
`P_k = s (B_k A_k - B A) = s (D_k A + B E_k + D_k E_k)` with `B, A` the factors that it received and `D_k, E_k` its deltas;
written so, nothing large cancels, however small the deltas are.

No product is formed in full. With `Q R = qr([B | D_1 | ... | D_K])` and the same for A, all products of a layer lie in the
span of the two Q, and their coordinates there, `P_k = Q_B C_k Q_A^T`, have the same distances and angles. The matrix C_k
has at most (K+1)R rows and columns, where the product has O and I.

A factor whose partner does not travel (FFA-LoRA, RoLoRA) is multiplied with the partner that the sites received. What is
not a LoRA factor, such as a soft prompt, is compared as it is.

A verdict on products is a verdict on an average *of products*. In a mean of factors, a site's A meets the other sites' B:
an update with a huge A and no B changes no product by itself, passes as harmless, and ruins the mean. So the rules that
mix sites are for strategies that average products, or where sites train B alone; Krum, which takes one site's update
whole, is for all (:mod:`strategies.compatibility`).

Shape legend: K updates, O out, I in, R rank, M and N rows and columns of coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedllm.update import Arrays, Layout, TensorSpec
from strategies.robust.space import Block, stack
from strategies.slots import UpdateSource

Scale = Callable[[int], float]
"""The adapter's scale s for a rank."""


@dataclass(frozen=True)
class Products:
    """The changes of the layers' products, in coordinates that keep distances and angles."""

    layout: Layout
    received: Arrays
    updates: Sequence[UpdateSource]
    scale: Scale

    def blocks(self) -> Iterator[Block]:
        """Yield one or several blocks a layer."""
        for linear, square in self._parts():
            yield linear if square is None else linear + square

    def growth(self) -> Block:
        """Return [K, 3]: of a product, `c (D A + B E) + c^2 D E` is left where both deltas are scaled by c."""
        total = np.zeros((len(self.updates), 3))
        for linear, square in self._parts():
            total[:, 0] += np.einsum("kn,kn->k", linear, linear)
            if square is not None:
                total[:, 1] += 2 * np.einsum("kn,kn->k", linear, square)
                total[:, 2] += np.einsum("kn,kn->k", square, square)
        return total

    def _parts(self) -> Iterator[tuple[Block, Block | None]]:
        done: set[str] = set()
        for spec in self.layout.tensors:
            pair = self._pair(spec)
            if pair is None:
                yield stack(self.updates, spec.name).reshape(len(self.updates), -1), None
            elif not done & set(pair):
                done |= set(pair)
                yield from self._products(*pair)

    def _pair(self, spec: TensorSpec) -> tuple[str, str] | None:
        """Return the names of the A and the B that a factor belongs to."""
        if spec.role not in ("lora_A", "lora_B"):
            return None
        right, left = spec.name.replace("lora_B", "lora_A"), spec.name.replace("lora_A", "lora_B")
        return (right, left) if right != left and right in self.received and left in self.received else None

    def _products(self, right: str, left: str) -> Iterator[tuple[Block, Block]]:
        count, rank = len(self.updates), len(self.received[right])
        b = _coordinates(self.received[left], self._deltas(left))  # [1 + K, M, R]
        a = _coordinates(self.received[right].T, self._deltas(right).swapaxes(1, 2))  # [1 + K, N, R]
        b *= self.scale(rank)
        # A block is half as large as a tensor, since several are alive at a time.
        width = max(1, max(self.received[left].size, self.received[right].size) // (2 * b.shape[1]))
        for start in range(0, a.shape[1], width):
            columns = a[:, start : start + width].swapaxes(1, 2)  # [1 + K, R, n]
            linear = b[1:] @ columns[0] + b[0] @ columns[1:]
            square = b[1:] @ columns[1:]
            yield linear.reshape(count, -1), square.reshape(count, -1)

    def _deltas(self, name: str) -> Block:
        """Return every update's delta of a factor, zero for one that does not travel in this round."""
        if name in self.layout:
            return stack(self.updates, name)
        return np.zeros((len(self.updates), *self.received[name].shape))


def _coordinates(received: NDArray[np.float32], deltas: Block) -> Block:
    """Return the received factor [O, R] and the deltas [K, O, R] in an orthonormal basis of all, [1 + K, M, R]."""
    factors = np.concatenate([received[None].astype(np.float64), deltas])
    count, rows, rank = factors.shape
    if count * rank >= rows:
        return factors
    side_by_side = factors.swapaxes(0, 1).reshape(rows, count * rank)
    triangle = np.asarray(np.linalg.qr(side_by_side, mode="r"))
    return np.ascontiguousarray(triangle.reshape(-1, count, rank).swapaxes(0, 1))
