"""What a codec stage is: the protocols of a pipeline's parts.

A pipeline is at most one stage of each ``array -> array`` kind, then exactly one ``array -> bytes`` stage, then (only
behind a stage whose positions travel) one index coder, then ``bytes -> bytes`` stages. A stage is a frozen dataclass whose
fields are its parameters; it holds no state and draws nothing that its arguments do not name.

Evolution rules: the pair (``name``, ``version``) never changes meaning. A change of bytes is a new version; old versions
stay readable. Golden files under ``tests/golden`` hold every pair to that.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Buffer = bytes | memoryview
Values = NDArray[np.float32]
Accumulator = NDArray[np.float32] | NDArray[np.float64]
Positions = slice | NDArray[np.int64]
"""Coordinates of a flat array: a slice, or strictly increasing indices."""


class Kind(Enum):
    """Where in a pipeline a stage may stand; the order of the members is the order of the stages."""

    DIFFERENCE = "array -> array, difference to a reference"
    SEGMENT = "array -> array, one part in turn"
    MASK = "array -> array, coordinates that both ends know"
    SPARSE = "array -> array, a few coordinates"
    VALUES = "array -> bytes"
    INDEX = "positions -> bytes"
    BYTES = "bytes -> bytes"


class Stage(Protocol):
    """The part that all stages share."""

    @property
    def name(self) -> str:
        """What the stage is called in a pipeline's text."""

    @property
    def version(self) -> int:
        """Version of the stage's bytes."""

    @property
    def kind(self) -> Kind:
        """Where the stage may stand."""

    @property
    def params(self) -> tuple[str, ...]:
        """The canonical parameter texts, from which the registry's factory builds an equal stage."""

    @property
    def is_linear(self) -> bool:
        """Whether decoding after encoding is a linear map, the same for all senders of a round."""

    @property
    def is_lossless(self) -> bool:
        """Whether decoding gives back the same bits."""


@dataclass(frozen=True)
class TensorView:
    """What a selecting stage may know about the tensor at hand; both ends know all of it.

    Attributes:
        name: The tensor's name.
        offset: Elements of the layout before this tensor.
        total: Elements of the whole layout.
        round: The federation's round.
        seed: The run's seed, as in the payload's header.
        site_index: The sender's number, as in the payload's header.
    """

    name: str
    offset: int
    total: int
    round: int
    seed: int
    site_index: int


class Selector(Stage, Protocol):
    """Picks some coordinates of a flat array."""

    @property
    def positions_travel(self) -> bool:
        """Whether the receiver cannot work the positions out and needs them."""

    @property
    def covers_all(self) -> bool:
        """Whether a coordinate that is not picked counts as zero (else the payload says nothing about it)."""

    def count(self, view: TensorView, length: int) -> int:
        """Return how many of ``length`` coordinates are picked, without looking at them."""

    def pick(self, view: TensorView, length: int, values: Values | None, reference: Values | None) -> Positions:
        """Return the positions; ``values`` is None at the receiver, which asks only if positions do not travel."""

    def gather(self, values: Values, positions: Positions) -> Values:
        """Return what travels for these positions."""


class ValuesStage(Stage, Protocol):
    """A flat float32 array of known length to bytes, and back."""

    def num_bytes(self, length: int) -> int:
        """Return the exact size of ``length`` encoded values."""

    def encode(self, values: Values, seed: int) -> bytes:
        """Encode finite float32 [length]; ``seed`` is used by stochastic rounding only."""

    def check(self, buffer: Buffer, length: int) -> None:
        """Refuse bytes of the right size that no encoder writes.

        Raises:
            NonFiniteError: A value or a scale is NaN, infinite or would decode to that.
            CorruptPayloadError: A field is outside its range.
        """

    def decode(self, buffer: Buffer, length: int) -> Values:
        """Return a new float32 [length] from a buffer that has passed :meth:`check`."""

    def add(self, buffer: Buffer, accumulator: Accumulator, weight: float) -> None:
        """Add ``weight`` times what :meth:`decode` returns to a flat accumulator, in the accumulator's precision."""


class IndexStage(Stage, Protocol):
    """Strictly increasing positions below a known length to bytes, and back; the number of positions is known."""

    def max_bytes(self, length: int, count: int) -> int:
        """Return the largest number of bytes that :meth:`encode` can give."""

    def encode(self, positions: NDArray[np.int64], length: int) -> bytes:
        """Encode int64 [count] positions below ``length``."""

    def decode(self, buffer: Buffer, length: int, count: int) -> NDArray[np.int64]:
        """Return int64 [count], raising :class:`CorruptPayloadError` for bytes that :meth:`encode` cannot give."""


class BytesStage(Stage, Protocol):
    """Bytes to bytes."""

    def max_bytes(self, num_bytes: int) -> int:
        """Return the largest number of bytes that :meth:`encode` can make of so many."""

    def encode(self, data: bytes) -> bytes:
        """Encode."""

    def decode(self, buffer: Buffer, max_bytes: int) -> bytes:
        """Return what was encoded.

        Raises:
            OversizedPayloadError: It announces or has more than ``max_bytes``; said before memory is set aside.
            CorruptPayloadError: It is not what :meth:`encode` gives.
        """
