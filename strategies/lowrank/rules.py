"""How the ideal product of a layer is factored into the next global B and A.

A rule sees one layer at a time: the ideal product after the round, the mean factors, and a fresh A. Whatever of the
product its factors leave out goes into the side adapter or is lost, as the strategy says
(:class:`strategies.lowrank.mean.ProductMean`).

All are given in orthonormal bases of the layer's columns and rows, and so are the factors that a rule makes: rules are
about products, norms and singular values, which are the same in every such basis.

Shape legend: O out and I in, or as many coordinates; R the federation's rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from strategies.lowrank.fair import corrected_left
from strategies.lowrank.product import Matrix, Product
from strategies.lowrank.refactor import refactor
from strategies.lowrank.spectrum import spectrum


@dataclass(frozen=True)
class Layer:
    """One layer at the end of a round.

    Attributes:
        target: The ideal product [O, I], scale and side factors in it.
        b: Mean B [O, R].
        a: Mean A [R, I].
        scale: s of the federation's adapter.
        fresh: An A [R, I] drawn anew, as for a first adapter.
    """

    target: Product
    b: Matrix
    a: Matrix
    scale: float
    fresh: Matrix

    @property
    def rank(self) -> int:
        """R."""
        return len(self.a)


class Rule(Protocol):
    """Chooses the next global factors of a layer."""

    def factor(self, layer: Layer) -> tuple[Matrix, Matrix]:
        """Return B [O, R] and A [R, I]; what `s B A` lacks of the target is dealt with elsewhere."""


@dataclass(frozen=True)
class Averages:
    """The mean factors as they are (FedEx-LoRA, which keeps what they lack)."""

    def factor(self, layer: Layer) -> tuple[Matrix, Matrix]:
        """Return the means."""
        return layer.b, layer.a


@dataclass(frozen=True)
class Restart:
    """A fresh A and B = 0 (FLoRA, which keeps the whole product apart)."""

    def factor(self, layer: Layer) -> tuple[Matrix, Matrix]:
        """Return factors whose product is zero."""
        return np.zeros_like(layer.b), layer.fresh


@dataclass(frozen=True)
class TopComponents:
    """The largest singular components (FlexLoRA; FLoRIST with a threshold below 1).

    Components of the adapter that are left over get a fresh row of A and B = 0: with both zero they would have no
    gradient and never learn again.

    Args:
        threshold: Keep the fewest components that hold this share of the squared norm, at most R; 1 keeps R.
    """

    threshold: float = 1.0

    def factor(self, layer: Layer) -> tuple[Matrix, Matrix]:
        """Return the components, the largest first, split evenly over both factors."""
        whole = spectrum(layer.target)
        kept = min(layer.rank, whole.rank_for(self.threshold) if self.threshold < 1 else whole.rank)
        top = whole.part(0, kept)
        b = np.zeros_like(layer.b)
        b[:, :kept] = top.left / np.sqrt(layer.scale)
        return b, np.vstack([top.right / np.sqrt(layer.scale), layer.fresh[kept:]])


@dataclass(frozen=True)
class Refactored:
    """`U S` and `V^T` of the product (FedSVD): A has orthonormal rows, in the space of the A before."""

    def factor(self, layer: Layer) -> tuple[Matrix, Matrix]:
        """Return the product of the mean B and the shared A, factored anew."""
        return refactor(Product(layer.b, layer.a), layer.rank)


@dataclass(frozen=True)
class Orthogonal:
    """The largest singular components of the ideal product, values in B; A has orthonormal rows (Fed-SB's first step)."""

    def factor(self, layer: Layer) -> tuple[Matrix, Matrix]:
        """Return the components."""
        return refactor(layer.target.scaled(1 / layer.scale), layer.rank)


@dataclass(frozen=True)
class Corrected:
    """The mean A, and the mean B moved towards the ideal product (LoRA-FAIR).

    Args:
        ridge: Penalty on the move, in proportion to the mean square of A's rows.
    """

    ridge: float

    def factor(self, layer: Layer) -> tuple[Matrix, Matrix]:
        """Return the corrected factors."""
        size = layer.scale**2 * float(np.sum(layer.a**2)) / layer.rank
        ridge = self.ridge * size if size else self.ridge
        return corrected_left(layer.target, layer.b, layer.a, layer.scale, ridge), layer.a
