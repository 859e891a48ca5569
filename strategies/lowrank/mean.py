"""The weighted mean of what sites apply, product by product, factored anew by a rule.

Each site applies `P_k = s B_k A_k + side` (all in the federation's coordinates, where a site's own rank and alpha are in
its factors already; see :mod:`fedllm.lora.cut`). The ideal product after the round moves by the mean of their moves,

    T = P + sum_k p_k (P_k - P_received),

which is `sum_k p_k P_k` where sites decoded what the server has; with a lossy downlink the difference stays, and is sent
later. T is held as one stack of factors, exactly. A rule makes the next B and A of it, and what `s B A` lacks goes into
the side factors, recompressed to their rank where it does not fit; without side factors it is lost. The share of T's
energy (its squared norm) that is not in the next state is measured every round as `discarded_energy`; its root is the
relative error of the round.

Memory: one layer of all updates at a time.

Shape legend: O out, I in, R the federation's rank, S rank of the side factors, K updates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedllm.lora.pairs import Pair, pairs_of
from fedllm.model.initial import initial_arrays
from fedllm.rng import derive
from fedllm.update import Arrays, Contribution, Layout
from strategies.lowrank.product import Matrix, Product, difference, nothing, product, total
from strategies.lowrank.rules import Layer, Rule
from strategies.lowrank.spectrum import norm_of, recompress
from strategies.slots import Aggregation, Measurements, Origin, UpdateSource


@dataclass(frozen=True)
class ProductMean:
    """An aggregator of LoRA updates that averages products.

    The delta that it returns leads to a new state, whatever it is added to in part: it goes with the plain server
    optimizer of rate 1 only.

    Args:
        rule: Makes the next factors.
        scale: s of the federation's adapter.
        seed: The run's seed, for fresh factors.
    """

    rule: Rule
    scale: float
    seed: int

    def start(self, layout: Layout, origin: Origin) -> Aggregation:
        """Begin the mean of a round."""
        return _Products(self, layout, origin)


@dataclass
class _Products:
    """Notes the updates; a layer's factors are read when it is its turn."""

    setup: ProductMean
    layout: Layout
    origin: Origin
    updates: list[tuple[UpdateSource, float]] = field(default_factory=list)
    reads_until_finish = True

    def fold(self, update: UpdateSource, contribution: Contribution) -> None:
        """Note an update and its weight."""
        assert contribution.weight > 0, "weights are checked before folding"
        self.updates.append((update, contribution.weight))

    def finish(self) -> tuple[Arrays, Measurements]:
        """Return the difference to the next state, and what was lost on the way."""
        assert self.updates, "finish() needs at least one update"
        delta: Arrays = {}
        account = _Account()
        fresh = initial_arrays(self.origin.layout, derive(self.setup.seed, self.origin.round, purpose="fresh factors"))
        for pair in pairs_of(self.origin.layout):
            after = self._layer(pair, fresh, account)
            delta |= {name: _difference(value, self.origin.params[name]) for name, value in after.items()}
        return {name: delta[name] for name in self.origin.layout.names if name in delta}, account.measurements

    def _layer(self, pair: Pair, fresh: Arrays, account: _Account) -> dict[str, Matrix]:
        """Return a layer's next tensors by name."""
        layer = self._gathered(pair, fresh[pair.a.name].astype(np.float64))
        b, a = self.setup.rule.factor(layer)
        lacking = difference(layer.target, product(b, a, self.setup.scale))
        kept = recompress(lacking, pair.side_rank)
        account.take(layer.target, self._applied(self.origin.params, pair), kept.discarded_energy, kept.kept.rank)
        after = {pair.a.name: a, pair.b.name: b}
        return after | (_padded(kept.kept, pair) if pair.side_rank else {})

    def _gathered(self, pair: Pair, fresh: Matrix) -> Layer:
        """Read a layer of every update into one stack and one pair of means."""
        params, received = self.origin.params, self.origin.received
        whole = math.fsum(weight for _, weight in self.updates)
        terms, mean_b, mean_a = [self._side(params, pair)], _zeros(pair.b.shape), _zeros(pair.a.shape)
        for update, weight in self.updates:
            step_b, step_a = (
                self._read(update, pair.b.name, pair.b.shape),
                self._read(update, pair.a.name, pair.a.shape),
            )
            b, a = received[pair.b.name] + step_b, received[pair.a.name] + step_a
            terms.append(product(b, a, self.setup.scale * weight / whole))
            mean_b += weight / whole * step_b
            mean_a += weight / whole * step_a
        terms += self._unsent(pair)
        b, a = params[pair.b.name] + mean_b, params[pair.a.name] + mean_a
        return Layer(total(terms), b, a, self.setup.scale, fresh)

    def _read(self, update: UpdateSource, name: str, shape: tuple[int, ...]) -> Matrix:
        return update.read(name).astype(np.float64) if name in self.layout else _zeros(shape)

    def _side(self, arrays: Arrays, pair: Pair) -> Product:
        return product(arrays[pair.side_b], arrays[pair.side_a]) if pair.side_rank else nothing(pair.shape)

    def _applied(self, arrays: Arrays, pair: Pair) -> Product:
        return total([self._side(arrays, pair), product(arrays[pair.b.name], arrays[pair.a.name], self.setup.scale)])

    def _unsent(self, pair: Pair) -> Sequence[Product]:
        """Return what the server has and the sites did not decode of the trained factors' product."""
        params, received = self.origin.params, self.origin.received
        if all(np.array_equal(params[name], received[name]) for name in (pair.a.name, pair.b.name)):
            return ()
        scale = self.setup.scale
        ours, theirs = (product(arrays[pair.b.name], arrays[pair.a.name], scale) for arrays in (params, received))
        return ours, theirs.scaled(-1.0)


@dataclass
class _Account:
    """What a round did to the products, over all layers."""

    energy: float = 0.0
    discarded: float = 0.0
    moved: float = 0.0
    side_rank: int = 0

    def take(self, target: Product, before: Product, discarded: float, side_rank: int) -> None:
        """Count a layer."""
        self.energy += norm_of(target) ** 2
        self.moved += norm_of(difference(target, before)) ** 2
        self.discarded += discarded
        self.side_rank = max(self.side_rank, side_rank)

    @property
    def measurements(self) -> dict[str, float]:
        """How far the product moved, and the share of its energy that is not in the next state."""
        share = self.discarded / self.energy if self.energy else 0.0
        return {"delta_norm": math.sqrt(self.moved), "discarded_energy": share, "side_rank": float(self.side_rank)}


def _zeros(shape: tuple[int, ...]) -> Matrix:
    return np.zeros(shape)


def _padded(term: Product, pair: Pair) -> dict[str, Matrix]:
    """Return side factors of the layout's rank, filled up with zeros."""
    missing = pair.side_rank - term.rank
    b, a = np.pad(term.left, ((0, 0), (0, missing))), np.pad(term.right, ((0, missing), (0, 0)))
    return {pair.side_a: a, pair.side_b: b}


def _difference(after: Matrix, before: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(after - before, np.float32)
