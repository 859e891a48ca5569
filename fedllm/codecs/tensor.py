"""One tensor through one branch of a pipeline: to a segment's bytes and back.

A segment is the encoded values, followed, where positions travel, by the encoded positions; the ``bytes -> bytes`` stages
then apply to the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedllm.codecs.dense import read_only
from fedllm.codecs.jit import kernel
from fedllm.codecs.pipeline import Branch, Pipeline
from fedllm.codecs.stage import Accumulator, Buffer, Positions, Selector, TensorView, Values
from fedllm.errors import CorruptPayloadError, explain
from fedllm.rng import derive
from fedllm.update import Layout


@dataclass(frozen=True)
class Opened:
    """A segment taken apart.

    Attributes:
        values: The bytes of the encoded values.
        length: How many values they are.
        positions: Where in the flat tensor they belong; increasing.
    """

    values: Buffer
    length: int
    positions: Positions


@dataclass(frozen=True)
class TensorCodec:
    """A branch bound to one tensor of one payload.

    Attributes:
        branch: The stages.
        view: What selecting stages may know.
        size: Elements of the tensor.
    """

    branch: Branch
    view: TensorView
    size: int

    def encode(self, values: Values, reference: Values | None, seed: int, site: str) -> bytes:
        """Return the segment of finite float32 [size]; reference float32 [size] is for ``mask``."""
        coded = b""
        for selector, length in self._selections:
            positions = selector.pick(self.view, length, values, reference)
            values = selector.gather(values, positions)
            reference = None if reference is None else reference[positions]
            if selector.positions_travel and self.branch.index and isinstance(positions, np.ndarray):
                coded = self.branch.index.encode(positions, length)
        noise = derive(seed, self.view.round, site, f"codec:{self.view.name}")
        data = self.branch.values.encode(read_only(values), noise) + coded
        for stage in self.branch.compressors:
            data = stage.encode(data)
        return data

    @property
    def max_bytes(self) -> int:
        """The largest segment that an honest encoder can write."""
        return self._bounds[-1]

    @cached_property
    def _bounds(self) -> list[int]:
        """Return the largest number of bytes before the compressors and after each of them."""
        bound = self.branch.values.num_bytes(self._num_values)
        for selector, length in self._selections:
            if selector.positions_travel and self.branch.index:
                bound += self.branch.index.max_bytes(length, selector.count(self.view, length))
        bounds = [bound]
        for stage in self.branch.compressors:
            bounds.append(stage.max_bytes(bounds[-1]))
        return bounds

    @cached_property
    def _selections(self) -> list[tuple[Selector, int]]:
        """Each selecting stage with the number of coordinates before it."""
        selections, length = [], self.size
        for selector in self.branch.selectors:
            selections.append((selector, length))
            length = selector.count(self.view, length)
        return selections

    @cached_property
    def _num_values(self) -> int:
        """How many values travel."""
        if not self._selections:
            return self.size
        selector, length = self._selections[-1]
        return selector.count(self.view, length)

    def open(self, segment: Buffer, reference: Values | None) -> Opened:
        """Take a segment apart.

        Raises:
            OversizedPayloadError: A compressed part is larger than the tensor can need.
            CorruptPayloadError: The segment has another structure.
        """
        for stage, bound in zip(reversed(self.branch.compressors), reversed(self._bounds[:-1]), strict=True):
            segment = stage.decode(segment, bound)
        length = self._num_values
        num_bytes = self.branch.values.num_bytes(length)
        if len(segment) < num_bytes or (len(segment) > num_bytes and self.branch.index is None):
            raise CorruptPayloadError(
                explain("a segment has another size than its tensor needs", expected=num_bytes, found=len(segment))
            )
        return Opened(segment[:num_bytes], length, self._positions(segment[num_bytes:], reference))

    def check(self, opened: Opened) -> None:
        """Refuse values that no encoder writes, which :meth:`decode` and :meth:`add` rely on.

        Raises:
            CorruptPayloadError: A field is outside its range.
            NonFiniteError: A value is NaN or infinite.
        """
        self.branch.values.check(opened.values, opened.length)

    def _positions(self, coded: Buffer, reference: Values | None) -> Positions:
        positions: Positions = slice(0, self.size)
        for selector, length in self._selections:
            if selector.positions_travel and self.branch.index:
                picked: Positions = self.branch.index.decode(coded, length, selector.count(self.view, length))
            else:
                picked = selector.pick(self.view, length, None, reference)
            reference = None if reference is None else reference[picked]
            positions = _compose(positions, picked)
        return positions

    def coverage(self, reference: Values | None) -> NDArray[np.bool_]:
        """Return bool [size], True where the payload says something about a coordinate."""
        positions: Positions = slice(0, self.size)
        for selector, length in self._selections:
            if selector.covers_all:
                continue
            picked = selector.pick(self.view, length, None, reference)
            reference = None if reference is None else reference[picked]
            positions = _compose(positions, picked)
        covered = np.zeros(self.size, np.bool_)
        covered[positions] = True
        return covered

    def decode(self, opened: Opened) -> Values:
        """Return float32 [size]; zero where nothing travelled."""
        if opened.length == self.size:
            return self.branch.values.decode(opened.values, self.size)
        values = np.zeros(self.size, np.float32)
        values[opened.positions] = self.branch.values.decode(opened.values, opened.length)
        return values

    def add(self, opened: Opened, accumulator: Accumulator, weight: float) -> None:
        """Add ``weight`` times the values to a flat accumulator [size]."""
        if isinstance(opened.positions, slice):
            self.branch.values.add(opened.values, accumulator[opened.positions], weight)
        else:
            values = self.branch.values.decode(opened.values, opened.length)
            _scatter(values, opened.positions, accumulator, accumulator.dtype.type(weight))


def bind(pipeline: Pipeline, layout: Layout, round_: int, seed: int, site_index: int) -> dict[str, TensorCodec]:
    """Return a codec for each tensor of a layout, by name in order.

    Raises:
        ConfigError: No branch covers a tensor's role.
    """
    codecs, offset, total = {}, 0, layout.num_parameters
    for spec in layout.tensors:
        view = TensorView(spec.name, offset, total, round_, seed, site_index)
        codecs[spec.name] = TensorCodec(pipeline.branch(spec.role), view, spec.size)
        offset += spec.size
    return codecs


def _compose(outer: Positions, inner: Positions) -> Positions:
    """Return where ``inner``, positions within what ``outer`` picks, lie in the whole."""
    if isinstance(outer, np.ndarray):
        return outer[inner]
    if isinstance(inner, np.ndarray):
        return inner + outer.start if outer.start else inner
    return slice(outer.start + inner.start, outer.start + inner.stop)


@kernel
def _scatter(values: Values, positions: NDArray[np.int64], accumulator: Accumulator, weight: np.floating) -> None:
    for i in range(positions.size):
        accumulator[np.uint64(positions[i])] += weight * values[i]
