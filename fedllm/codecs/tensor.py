"""One tensor through one branch of a pipeline: to a segment's bytes and back."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.codecs.container import PayloadHeader
from fedllm.codecs.pipeline import Branch
from fedllm.codecs.stage import Accumulator, Buffer, Values
from fedllm.errors import CorruptPayloadError, explain
from fedllm.rng import derive
from fedllm.update import TensorSpec


@dataclass(frozen=True)
class TensorCodec:
    """A branch bound to one tensor of one payload.

    Attributes:
        branch: The stages.
        spec: The tensor.
        header: The payload's header, for the round, the seed and the site's index.
    """

    branch: Branch
    spec: TensorSpec
    header: PayloadHeader

    def encode(self, values: Values, seed: int, site: str) -> bytes:
        """Return the segment of finite float32 [size] values."""
        noise = derive(seed, self.header.round, site, f"codec:{self.spec.name}")
        return self.branch.values.encode(values, noise)

    @property
    def max_bytes(self) -> int:
        """The largest segment that an honest encoder can write."""
        return self.branch.values.num_bytes(self.spec.size)

    def open(self, segment: Buffer) -> Buffer:
        """Check a segment's structure and finiteness and return the bytes of its values.

        Raises:
            CorruptPayloadError: The segment has another structure.
            NonFiniteError: A value is NaN or infinite.
        """
        expected = self.branch.values.num_bytes(self.spec.size)
        if len(segment) != expected:
            raise CorruptPayloadError(
                explain("a segment has another size than its tensor needs", expected=expected, found=len(segment))
            )
        self.branch.values.check(segment, self.spec.size)
        return segment

    def decode(self, opened: Buffer) -> Values:
        """Return float32 [size] from what :meth:`open` returned."""
        return self.branch.values.decode(opened, self.spec.size)

    def add(self, opened: Buffer, accumulator: Accumulator, weight: float) -> None:
        """Add ``weight`` times the values to a flat accumulator [size]."""
        self.branch.values.add(opened, accumulator, weight)
