"""What a codec stage is, and the registry of all stages.

A pipeline is ``array -> array`` stages, then exactly one ``array -> bytes`` stage, then (only behind a stage that picks
its own positions) one index coder, then ``bytes -> bytes`` stages. A stage is a frozen dataclass whose fields are its
parameters; it holds no state and draws nothing that its arguments do not name.

Evolution rules: the pair (``name``, ``version``) never changes meaning. A change of bytes is a new version; old
versions stay readable. Golden files under ``tests/golden`` hold every pair to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import ConfigError, explain

Buffer = bytes | memoryview
Values = NDArray[np.float32]
Accumulator = NDArray[np.float32] | NDArray[np.float64]


class Kind(Enum):
    """Where in a pipeline a stage may stand; the order of the members is the order of the stages."""

    DIFFERENCE = "array -> array, difference to a reference"
    SELECT = "array -> array, selection of coordinates"
    VALUES = "array -> bytes"
    INDEX = "positions -> bytes"
    BYTES = "bytes -> bytes"


class Stage(Protocol):
    """The part that all stages share.

    Attributes:
        name: What the stage is called in a pipeline's text.
        version: Version of its bytes.
        kind: Where it may stand.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    kind: ClassVar[Kind]
    is_linear: ClassVar[bool]
    is_lossless: ClassVar[bool]

    @classmethod
    def from_params(cls, params: Sequence[str]) -> Stage:
        """Build the stage from the texts between its colons, raising :class:`ConfigError` for what it cannot be."""
        ...

    @property
    def params(self) -> tuple[str, ...]:
        """The canonical texts that :meth:`from_params` turns into an equal stage."""
        ...


class ValuesStage(Stage, Protocol):
    """A flat float32 array of known length to bytes of known length, and back."""

    def num_bytes(self, length: int) -> int:
        """Exact number of bytes of ``length`` encoded values."""
        ...

    def encode(self, values: Values, seed: int) -> bytes:
        """Encode finite float32 [length]; ``seed`` is used by stochastic rounding only."""
        ...

    def check(self, buffer: Buffer, length: int) -> None:
        """Refuse bytes that would decode to NaN or infinity (``buffer`` already has the exact number of bytes).

        Raises:
            NonFiniteError: A value or a scale is not finite.
            CorruptPayloadError: A code or a scale is outside its range.
        """
        ...

    def decode(self, buffer: Buffer, length: int) -> Values:
        """Return a new float32 [length]; the buffer has passed :meth:`check`."""
        ...

    def add(self, buffer: Buffer, accumulator: Accumulator, weight: float) -> None:
        """Add ``weight`` times the decoded values to a flat accumulator, in the accumulator's precision."""
        ...


STAGES: dict[tuple[str, int], type[Stage]] = {}
"""All stages by (name, version). Add with :func:`register`."""

StageT = TypeVar("StageT", bound=type[Stage])


def register(stage: StageT) -> StageT:
    """Add a stage class to :data:`STAGES`; usable as a decorator.

    Raises:
        ConfigError: The name and version are taken.
    """
    key = (stage.name, stage.version)
    if key in STAGES:
        raise ConfigError(explain("a codec stage is registered twice", found=f"{stage.name}@{stage.version}"))
    STAGES[key] = stage
    return stage


def latest_version(name: str) -> int:
    """Return the newest registered version of a stage, 0 if the name is unknown."""
    return max((version for known, version in STAGES if known == name), default=0)


def no_params(name: str, params: Sequence[str]) -> None:
    """Refuse parameters for a stage that has none.

    Raises:
        ConfigError: There are parameters.
    """
    if params:
        raise ConfigError(explain(f"codec stage {name!r} takes no parameters", found=":".join(params)))
