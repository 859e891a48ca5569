"""Where the updates of a round are compared: each update as one row of float64 numbers, read block by block.

A rule needs norms, distances and angles between updates. They are taken on *deltas*, which are the small difference of two
large states, and from the differences themselves: expanding `|x|^2 + |y|^2 - 2 x.y` on parameters in float32, as Flower's
Krum does, has errors many times the distance (and negative squares) where deltas are 1e-4 of the parameters.

A block holds a few coordinates of all updates, so memory is one tensor of every update at a time. Every function below
reads all updates once.

Shape legend: K updates, N coordinates of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedllm.update import Arrays, Layout
from strategies.slots import UpdateSource

Block = NDArray[np.float64]
Vector = NDArray[np.float64]

COLUMNS = 1 << 14
"""Coordinates compared or sorted at a time, so that a block stays in the processor's cache."""


class Space(Protocol):
    """Updates as vectors."""

    def blocks(self) -> Iterator[Block]:
        """Yield blocks [K, N] whose columns side by side are the updates."""

    def growth(self) -> Block:
        """Return [K, 3]: an update scaled by `c` has the squared norm `growth @ [c^2, c^3, c^4]`."""


class SpaceOf(Protocol):
    """Makes a space of a round's updates."""

    def __call__(self, layout: Layout, received: Arrays, updates: Sequence[UpdateSource]) -> Space:
        """Return the space of these updates to the state that the sites received."""


@dataclass(frozen=True)
class Factors:
    """The deltas of the tensors as they travel, side by side: for LoRA, of the factors A and B apart."""

    layout: Layout
    received: Arrays
    updates: Sequence[UpdateSource]

    def blocks(self) -> Iterator[Block]:
        """Yield one block a tensor."""
        for name in self.layout.names:
            yield stack(self.updates, name).reshape(len(self.updates), -1)

    def growth(self) -> Block:
        """Return [K, 3]: a delta's norm grows with its scale."""
        squares = sum(np.einsum("kn,kn->k", block, block) for block in self.blocks())
        return np.stack([squares, np.zeros_like(squares), np.zeros_like(squares)], axis=1)


def stack(updates: Sequence[UpdateSource], name: str) -> Block:
    """Read one tensor of every update, [K, ...] in the tensor's shape."""
    first = updates[0].read(name)
    rows = np.empty((len(updates), *first.shape))
    rows[0] = first
    for row, update in zip(rows[1:], updates[1:], strict=True):
        row[...] = update.read(name)
    return rows


def squared_distances(space: Space) -> Block:
    """Return the squared distance of every two updates, [K, K]."""
    total: Block | None = None
    for part in _parts(space):
        total = np.zeros((len(part), len(part))) if total is None else total
        for row in range(len(part) - 1):
            gap = part[row + 1 :] - part[row]
            total[row, row + 1 :] += np.einsum("kn,kn->k", gap, gap)
    assert total is not None, "a layout has a tensor"
    return total + total.T


def distances_to_mean(space: Space, shares: Vector) -> Vector:
    """Return every update's distance to the mean with these shares, [K]; the shares [K] sum to 1."""
    total = np.zeros(len(shares))
    for part in _parts(space):
        gap = part - shares @ part
        total += np.einsum("kn,kn->k", gap, gap)
    return np.sqrt(total)


def cosines(space: Space, reference: int) -> Vector:
    """Return the cosine of the angle between every update and one of them, [K]; 0 where an update is zero."""
    dots, squares = np.zeros(()), np.zeros(())
    for part in _parts(space):
        dots = dots + part @ part[reference]
        squares = squares + np.einsum("kn,kn->k", part, part)
    lengths = np.sqrt(squares * squares[reference])
    return np.asarray(np.divide(dots, lengths, out=np.zeros_like(dots), where=lengths > 0))


def norms(growth: Block) -> Vector:
    """Return the norms [K] of the updates as they are."""
    return np.asarray(np.sqrt(np.maximum(growth.sum(axis=1), 0.0)))


def scales_to(growth: Block, norm: float) -> Vector:
    """Return for every update the smallest factor [K] with which it has the given norm; 0 for an update of norm 0."""
    return np.array([_scale_to(row, norm) for row in growth])


def _scale_to(row: Vector, norm: float) -> float:
    square, cube, fourth = row
    if not row.any() or norm == 0.0:
        return 0.0
    if not cube and not fourth:
        return float(norm / np.sqrt(square))
    # In u = c / unit the polynomial's value at 1 is about 1, which keeps its roots well conditioned.
    unit = norm / np.sqrt(square) if square else np.sqrt(norm / np.sqrt(fourth))
    polynomial = [fourth * unit**4, cube * unit**3, square * unit**2, 0.0, -(norm**2)]
    roots = np.roots(polynomial)
    real = roots.real[(np.abs(roots.imag) <= 1e-9 * np.abs(roots)) & (roots.real > 0)]
    assert real.size, "the norm grows from 0 without bound"
    return float(unit * real.min())


def _parts(space: Space) -> Iterator[Block]:
    for block in space.blocks():
        for start in range(0, block.shape[1], COLUMNS):
            yield block[:, start : start + COLUMNS]
