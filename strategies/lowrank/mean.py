"""The weighted mean of what sites apply, product by product, factored anew by a rule.

Each site applies `P_k = s B_k A_k + side` (all in the federation's coordinates, where a site's own rank and alpha are in
its factors already; see :mod:`fedllm.lora.cut`). The ideal product after the round moves by the mean of their moves,

    T = P + sum_k p_k (P_k - P_received),

which is `sum_k p_k P_k` where sites decoded what the server has; with a lossy downlink the difference stays, and is sent
later. T is held as one stack of factors, exactly. A rule makes the next B and A of it, and what `s B A` lacks goes into
the side factors, recompressed to their rank where it does not fit; without side factors it is lost. The share of T's
energy (its squared norm) that is not in the next state is measured every round as `discarded_energy`; its root is the
relative error of the round.

All of it happens in coordinates: everything that a layer's round is made of is brought into two orthonormal bases once,
one of columns and one of rows, which keep products, norms and singular values. What follows has S + (K + 3) R rows and
columns in place of O and I, and only the next factors are taken back.

Memory: one layer of all updates at a time.

Shape legend: O out, I in, R the federation's rank, S rank of the side factors, K updates, M and N coordinates.
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
from fedllm.update import Arrays, Contribution, Layout, TensorSpec
from strategies.lowrank.product import Matrix, Product, difference, product, total
from strategies.lowrank.rules import Layer, Rule
from strategies.lowrank.span import Frame, frame
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
        seed = derive(self.setup.seed, self.origin.round, purpose="fresh factors")
        for pair in pairs_of(self.origin.layout):
            after = self._layer(pair, seed, account)
            delta |= {name: _difference(value, self.origin.params[name]) for name, value in after.items()}
        return {name: delta[name] for name in self.origin.layout.names if name in delta}, account.measurements

    def _layer(self, pair: Pair, seed: int, account: _Account) -> dict[str, Matrix]:
        """Return a layer's next tensors by name."""
        [fresh] = initial_arrays(Layout((pair.a,)), seed).values()
        columns = frame(self._parts(pair.b, pair.side_b))
        rows = frame(self._parts(pair.a, pair.side_a) | {"fresh": _columns(fresh, pair.a)})
        layer, before = self._gathered(columns, rows), self._before(columns, rows)
        b, a = self.setup.rule.factor(layer)
        lacking = difference(layer.target, product(b, a, self.setup.scale))
        rest = recompress(lacking, pair.side_rank)
        account.take(layer.target, before, rest.discarded_energy, rest.kept.rank)
        after = {pair.b.name: columns.restored(b), pair.a.name: rows.restored(a.T).T}
        side = Product(columns.restored(rest.kept.left), rows.restored(rest.kept.right.T).T)
        return after | (_padded(side, pair) if pair.side_rank else {})

    def _parts(self, spec: TensorSpec, side: str) -> dict[str, Matrix]:
        """Return all that makes one factor in a round, as columns [O, *] or [I, *], zero where a site says nothing."""
        params, received = self.origin.params, self.origin.received
        ours = _columns(params[spec.name], spec)
        steps = np.zeros((len(ours), len(self.updates), ours.shape[1]))
        if spec.name in self.layout:
            for number, (update, _) in enumerate(self.updates):
                steps[:, number] = _columns(update.read(spec.name), spec)
        return {
            "side": _columns(params[side], spec) if side in params else np.zeros((len(ours), 0)),
            "ours": ours,
            "unsent": ours - _columns(received[spec.name], spec),
            "steps": steps.reshape(len(ours), -1),
        }

    def _gathered(self, columns: Frame, rows: Frame) -> Layer:
        """Bring a layer of every update into one stack and one pair of means."""
        count, rank, scale = len(self.updates), columns["ours"].shape[1], self.setup.scale
        weights = np.array([weight for _, weight in self.updates])
        shares = np.repeat(weights / weights.sum(), rank)  # [K R]
        b, a = (np.tile(_received(side), count) + side["steps"] for side in (columns, rows))  # [M, K R], [N, K R]
        terms = [_side(columns, rows), product(b * shares, a.T, scale), *self._unsent(columns, rows)]
        mean_b, mean_a = (
            side["ours"] + (side["steps"] * shares).reshape(-1, count, rank).sum(axis=1) for side in (columns, rows)
        )
        return Layer(total(terms), mean_b, mean_a.T, scale, rows["fresh"].T)

    def _before(self, columns: Frame, rows: Frame) -> Product:
        """Return what the state before the round applies."""
        return total([_side(columns, rows), product(columns["ours"], rows["ours"].T, self.setup.scale)])

    def _unsent(self, columns: Frame, rows: Frame) -> Sequence[Product]:
        """Return what the server has and the sites did not decode of the trained factors' product."""
        if not columns["unsent"].any() and not rows["unsent"].any():
            return ()
        ours = product(columns["ours"], rows["ours"].T, self.setup.scale)
        return ours, product(_received(columns), _received(rows).T, -self.setup.scale)


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


def _columns(value: NDArray[np.float32], spec: TensorSpec) -> Matrix:
    """Return a factor as columns: A stands on its side."""
    return np.asarray(value.T if spec.role == "lora_A" else value, np.float64)


def _received(side: Frame) -> Matrix:
    return side["ours"] - side["unsent"]


def _side(columns: Frame, rows: Frame) -> Product:
    return product(columns["side"], rows["side"].T)


def _padded(term: Product, pair: Pair) -> dict[str, Matrix]:
    """Return side factors of the layout's rank, filled up with zeros."""
    missing = pair.side_rank - term.rank
    b, a = np.pad(term.left, ((0, 0), (0, missing))), np.pad(term.right, ((0, missing), (0, 0)))
    return {pair.side_a: a, pair.side_b: b}


def _difference(after: Matrix, before: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(after - before, np.float32)
