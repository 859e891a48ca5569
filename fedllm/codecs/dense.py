"""Plain number formats: ``fp32`` and ``bf16``."""

# ruff: noqa: D102 (the methods are described in fedllm.codecs.stage)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedllm.codecs.stage import Accumulator, Buffer, Kind, Values, no_params, register
from fedllm.errors import NonFiniteError, explain


@register
@dataclass(frozen=True)
class Fp32:
    """IEEE binary32, little endian: the bits as they are."""

    name: ClassVar[str] = "fp32"
    version: ClassVar[int] = 1
    kind: ClassVar[Kind] = Kind.VALUES
    is_linear: ClassVar[bool] = True
    is_lossless: ClassVar[bool] = True

    @classmethod
    def from_params(cls, params: Sequence[str]) -> Fp32:
        no_params(cls.name, params)
        return cls()

    @property
    def params(self) -> tuple[str, ...]:
        return ()

    def num_bytes(self, length: int) -> int:
        return 4 * length

    def encode(self, values: Values, seed: int) -> bytes:  # noqa: ARG002
        return values.astype("<f4", copy=False).tobytes()

    def check(self, buffer: Buffer, length: int) -> None:  # noqa: ARG002
        _refuse_non_finite(np.isfinite(np.frombuffer(buffer, "<f4")).all(), self.name)

    def decode(self, buffer: Buffer, length: int) -> Values:
        return np.frombuffer(buffer, "<f4", count=length).astype(np.float32)

    def add(self, buffer: Buffer, accumulator: Accumulator, weight: float) -> None:
        values = np.frombuffer(buffer, "<f4", count=len(accumulator))
        accumulator += np.multiply(values, weight, dtype=accumulator.dtype)


@register
@dataclass(frozen=True)
class Bf16:
    """The upper 16 bits of binary32 after rounding to nearest, ties to even; as uint16, little endian.

    A finite value beyond the largest finite bfloat16 (3.39e38) becomes that value, never infinity.
    """

    name: ClassVar[str] = "bf16"
    version: ClassVar[int] = 1
    kind: ClassVar[Kind] = Kind.VALUES
    is_linear: ClassVar[bool] = False
    is_lossless: ClassVar[bool] = False

    @classmethod
    def from_params(cls, params: Sequence[str]) -> Bf16:
        no_params(cls.name, params)
        return cls()

    @property
    def params(self) -> tuple[str, ...]:
        return ()

    def num_bytes(self, length: int) -> int:
        return 2 * length

    def encode(self, values: Values, seed: int) -> bytes:  # noqa: ARG002
        return to_bf16_bits(values).astype("<u2", copy=False).tobytes()

    def check(self, buffer: Buffer, length: int) -> None:  # noqa: ARG002
        exponents = np.frombuffer(buffer, "<u2") & np.uint16(0x7F80)
        _refuse_non_finite(not (exponents == 0x7F80).any(), self.name)

    def decode(self, buffer: Buffer, length: int) -> Values:
        return from_bf16_bits(np.frombuffer(buffer, "<u2", count=length))

    def add(self, buffer: Buffer, accumulator: Accumulator, weight: float) -> None:
        values = self.decode(buffer, len(accumulator))
        accumulator += np.multiply(values, weight, dtype=accumulator.dtype)


def to_bf16_bits(values: Values) -> NDArray[np.uint16]:
    """Round finite float32 to bfloat16 bits: nearest, ties to even, saturating."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    overflowed = (rounded & np.uint32(0x7FFF)) == 0x7F80
    bits16: NDArray[np.uint16] = (rounded - overflowed).astype(np.uint16)
    return bits16


def from_bf16_bits(bits: NDArray[np.uint16]) -> Values:
    """Return the float32 values of bfloat16 bits, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _refuse_non_finite(finite: bool | np.bool_, name: str) -> None:
    if not finite:
        raise NonFiniteError(explain("an encoded tensor holds NaN or infinity", where=f"stage {name}"))
