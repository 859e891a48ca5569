"""Which tensors of a layout belong together: one adapted layer's A and B, and its side factors where there are any.

A federation's adapter applies, at each adapted layer, `s B A + side_B side_A` on top of the frozen base: B and A are
trained (roles `lora_B` [O, R], `lora_A` [R, I], with `s = alpha / R` or `alpha / sqrt(R)`), the side factors (roles
`side_B` [O, S], `side_A` [S, I]) are not. They hold what does not fit into R components, in float32 and never in the
quantized base, where it would be rounded away.

Names: the layer `x` has `x.lora_A.weight` and `x.lora_B.weight`, as in PEFT's files, and `x.side_A.weight`,
`x.side_B.weight`. In a layout the side factors follow after all trained tensors, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedllm.errors import LayoutError, explain
from fedllm.update import Layout, TensorSpec

TRAINED = ("lora_A", "lora_B")
SIDE = ("side_A", "side_B")


@dataclass(frozen=True)
class Pair:
    """One adapted layer's tensors.

    Attributes:
        layer: The layer's name.
        a: Spec of A [R, I].
        b: Spec of B [O, R].
        side_rank: S, 0 without side factors.
    """

    layer: str
    a: TensorSpec
    b: TensorSpec
    side_rank: int = 0

    @property
    def side_a(self) -> str:
        """Name of side_A."""
        return f"{self.layer}.side_A.weight"

    @property
    def side_b(self) -> str:
        """Name of side_B."""
        return f"{self.layer}.side_B.weight"

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.b.shape[0], self.a.shape[1]


def pairs_of(layout: Layout) -> tuple[Pair, ...]:
    """Return the layout's adapted layers in order.

    Raises:
        LayoutError: A factor lacks its counterpart, or ranks do not fit.
    """
    by_name = {spec.name: spec for spec in layout.tensors}
    return tuple(_pair(spec, by_name) for spec in layout.tensors if spec.role == "lora_A")


def with_rank(layout: Layout, rank: int, side_rank: int = 0) -> Layout:
    """Return the layout of the same layers at another rank, without the side factors of before.

    Args:
        layout: A LoRA adapter's.
        rank: R of the new one.
        side_rank: S of the new one's side factors, at most what a layer's matrix can have; 0 for none.
    """
    trained = [_resized(spec, rank) for spec in layout.tensors if spec.role in TRAINED]
    side = (tensor for pair in pairs_of(Layout(tuple(trained))) for tensor in _side(pair, side_rank))
    return Layout((*trained, *(side if side_rank else ())))


def _resized(spec: TensorSpec, rank: int) -> TensorSpec:
    shape = (rank, spec.shape[1]) if spec.role == "lora_A" else (spec.shape[0], rank)
    return TensorSpec(spec.name, shape, spec.dtype, spec.role)


def _side(pair: Pair, side_rank: int) -> Iterable[TensorSpec]:
    rank = min(side_rank, *pair.shape)
    yield TensorSpec(pair.side_a, (rank, pair.a.shape[1]), "float32", "side_A")
    yield TensorSpec(pair.side_b, (pair.b.shape[0], rank), "float32", "side_B")


def _pair(a: TensorSpec, by_name: Mapping[str, TensorSpec]) -> Pair:
    layer = a.name.removesuffix(".lora_A.weight")
    b, side_a, side_b = (by_name.get(f"{layer}.{role}.weight") for role in ("lora_B", "side_A", "side_B"))
    if b is None or not _multiply(b, a):
        raise LayoutError(explain("a layer's factors do not fit each other", found=[a, b], where=layer))
    if side_a is None and side_b is None:
        return Pair(layer, a, b)
    is_same_size = side_a and side_b and (side_b.shape[0], side_a.shape[-1]) == (b.shape[0], a.shape[1])
    if side_a is None or side_b is None or not is_same_size or not _multiply(side_b, side_a):
        raise LayoutError(explain("a layer's side factors do not fit it", found=[a, b, side_a, side_b], where=layer))
    return Pair(layer, a, b, side_a.shape[0])


def _multiply(left: TensorSpec, right: TensorSpec) -> bool:
    return len(left.shape) == len(right.shape) == 2 and left.shape[1] == right.shape[0]
