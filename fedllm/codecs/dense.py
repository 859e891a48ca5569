"""Number formats that keep every coordinate: ``fp32``, ``bf16``, ``fp16``."""

# ruff: noqa: D102 (the methods are described in fedllm.codecs.stage)

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedllm.codecs.jit import kernel
from fedllm.codecs.params import no_params
from fedllm.codecs.stage import Accumulator, Buffer, Kind, Values
from fedllm.errors import CorruptPayloadError, NonFiniteError, explain

MAX_EXPONENT = 113
"""Largest per-tensor exponent: it brings a finite float32 into [2^14, 2^15)."""

MIN_EXPONENT = -200

_INFINITY = 0x7F800000


@dataclass(frozen=True)
class Fp32:
    """IEEE binary32, little endian: the bits as they are."""

    name = "fp32"
    version = 1
    kind = Kind.VALUES
    params = ()
    is_linear = True
    is_lossless = True

    def num_bytes(self, length: int) -> int:
        return 4 * length

    def encode(self, values: Values, seed: int) -> bytes:  # noqa: ARG002
        return values.astype("<f4", copy=False).tobytes()

    def check(self, buffer: Buffer, length: int) -> None:  # noqa: ARG002
        if _largest_magnitude(aligned(buffer, "<u4")) >= _INFINITY:
            raise NonFiniteError(explain("an encoded tensor holds NaN or infinity", where="stage fp32"))

    def decode(self, buffer: Buffer, length: int) -> Values:
        return np.frombuffer(buffer, "<f4", count=length).astype(np.float32)

    def add(self, buffer: Buffer, accumulator: Accumulator, weight: float) -> None:
        add_values(aligned(buffer, "<f4"), accumulator, weight)


@dataclass(frozen=True)
class Bf16:
    """The upper 16 bits of binary32 after rounding to nearest, ties to even; as uint16, little endian.

    A finite value beyond the largest finite bfloat16 (3.39e38) becomes that value, never infinity.
    """

    name = "bf16"
    version = 1
    kind = Kind.VALUES
    params = ()
    is_linear = False
    is_lossless = False

    def num_bytes(self, length: int) -> int:
        return 2 * length

    def encode(self, values: Values, seed: int) -> bytes:  # noqa: ARG002
        return to_bf16_bits(values).astype("<u2", copy=False).tobytes()

    def check(self, buffer: Buffer, length: int) -> None:  # noqa: ARG002
        exponents = aligned(buffer, "<u2") & np.uint16(0x7F80)
        if exponents.size and exponents.max() == 0x7F80:
            raise NonFiniteError(explain("an encoded tensor holds NaN or infinity", where="stage bf16"))

    def decode(self, buffer: Buffer, length: int) -> Values:
        return from_bf16_bits(np.frombuffer(buffer, "<u2", count=length))

    def add(self, buffer: Buffer, accumulator: Accumulator, weight: float) -> None:
        _add_bf16(aligned(buffer, "<u2"), accumulator, accumulator.dtype.type(weight))


@dataclass(frozen=True)
class Fp16:
    """IEEE binary16 times 2^E with one exponent E for the tensor: int16 E, then the halves, little endian.

    E brings the largest magnitude into [2^14, 2^15), so nothing overflows. Values down to 2^-28 of the largest keep a
    relative error of at most 2^-11, smaller ones an absolute error of at most 2^-39 of the largest.
    """

    name = "fp16"
    version = 1
    kind = Kind.VALUES
    params = ()
    is_linear = False
    is_lossless = False

    def num_bytes(self, length: int) -> int:
        return 2 + 2 * length

    def encode(self, values: Values, seed: int) -> bytes:  # noqa: ARG002
        exponent = tensor_exponent(float(np.abs(values).max(initial=0.0)))
        halves = np.empty(len(values), np.uint16)
        # Rounding up to 2^15 times 2^113 would be infinite.
        largest = 0x77FF if exponent == MAX_EXPONENT else 0x7800
        _round_to_fp16(read_only(values), 2.0**-exponent, np.uint32(largest), halves)
        return np.array(exponent, "<i2").tobytes() + halves.astype("<u2", copy=False).tobytes()

    def check(self, buffer: Buffer, length: int) -> None:  # noqa: ARG002
        exponent = read_exponent(buffer)
        largest = int((aligned(buffer[2:], "<u2") & np.uint16(0x7FFF)).max(initial=0))
        if largest >= 0x7C00 or math.ldexp(float(np.uint16(largest).view(np.float16)), exponent) >= 2.0**128:
            raise NonFiniteError(explain("an encoded tensor holds NaN or infinity", where="stage fp16"))

    def decode(self, buffer: Buffer, length: int) -> Values:
        values = np.zeros(length, np.float32)
        self.add(buffer, values, 1.0)
        return values

    def add(self, buffer: Buffer, accumulator: Accumulator, weight: float) -> None:
        factor = 2.0 ** (112 + read_exponent(buffer))
        _add_fp16(aligned(buffer[2:], "<u2"), factor, accumulator, accumulator.dtype.type(weight))


def make_fp32(params: Sequence[str]) -> Fp32:
    """Build the stage ``fp32``."""
    no_params(Fp32.name, params)
    return Fp32()


def make_bf16(params: Sequence[str]) -> Bf16:
    """Build the stage ``bf16``."""
    no_params(Bf16.name, params)
    return Bf16()


def make_fp16(params: Sequence[str]) -> Fp16:
    """Build the stage ``fp16``."""
    no_params(Fp16.name, params)
    return Fp16()


def to_bf16_bits(values: Values) -> NDArray[np.uint16]:
    """Round finite float32 to bfloat16 bits: nearest, ties to even, saturating."""
    rounded = np.empty(values.shape, np.uint16)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    _round_to_bf16(read_only(bits.reshape(-1)), rounded.reshape(-1))
    return rounded


def from_bf16_bits(bits: NDArray[np.uint16]) -> Values:
    """Return the float32 values of bfloat16 bits, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def add_values(values: Values, accumulator: Accumulator, weight: float) -> None:
    """Add ``weight`` times float32 [n] to an accumulator [n] in the accumulator's precision."""
    _add(read_only(values), accumulator, accumulator.dtype.type(weight))


def aligned(buffer: Buffer, dtype: str) -> NDArray[Any]:
    """View a buffer as numbers; one that starts at an odd address is copied, because kernels want aligned arrays."""
    numbers: NDArray[Any] = np.frombuffer(buffer, dtype)
    return numbers if numbers.flags.aligned else read_only(numbers.copy())


ArrayT = TypeVar("ArrayT", bound=NDArray[Any])


def read_only(array: ArrayT) -> ArrayT:
    """Return a view that cannot be written, so that numba compiles a kernel for one kind of input only."""
    view = array.view()
    view.flags.writeable = False
    return view


def tensor_exponent(peak: float) -> int:
    """Return E with ``peak / 2^E`` in [2^14, 2^15), 0 for a peak of zero."""
    return math.frexp(peak)[1] - 15 if peak else 0


def read_exponent(buffer: Buffer) -> int:
    """Read the int16 exponent in front of a tensor.

    Raises:
        CorruptPayloadError: It is outside the range of float32.
    """
    exponent = int.from_bytes(buffer[:2], "little", signed=True)
    if not MIN_EXPONENT <= exponent <= MAX_EXPONENT:
        raise CorruptPayloadError(
            explain("a tensor's exponent is impossible", expected=f"{MIN_EXPONENT} to {MAX_EXPONENT}", found=exponent)
        )
    return exponent


@kernel
def _largest_magnitude(bits: NDArray[Any]) -> int:
    """Return the largest bits without the sign; of finite float32 they are below those of infinity."""
    largest = np.uint32(0)
    for i in range(bits.size):
        magnitude = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
        largest = magnitude if magnitude > largest else largest
    return int(largest)


@kernel
def _round_to_bf16(bits: NDArray[np.uint32], rounded: NDArray[np.uint16]) -> None:
    for i in range(bits.size):
        word = bits[i]
        upper = np.uint32((word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
        if (upper & np.uint32(0x7FFF)) == np.uint32(0x7F80):
            upper = np.uint32(upper - np.uint32(1))
        rounded[i] = np.uint16(upper)


@kernel
def _add_bf16(bits: NDArray[np.generic], accumulator: Accumulator, weight: np.floating) -> None:
    words = np.empty(4096, np.uint32)
    values = words.view(np.float32)
    for start in range(0, accumulator.size, 4096):
        part = accumulator[start : start + 4096]
        source = bits[start : start + 4096]
        for i in range(part.size):
            words[i] = np.uint32(source[i]) << np.uint32(16)
        for i in range(part.size):
            part[i] += weight * values[i]


@kernel
def _add(values: Values, accumulator: Accumulator, weight: np.floating) -> None:
    for i in range(accumulator.size):
        accumulator[i] += weight * values[i]


@kernel
def _round_to_fp16(values: Values, factor: float, largest: np.uint32, halves: NDArray[np.uint16]) -> None:
    """Write the binary16 bits of ``values * factor``: nearest, ties to even, magnitudes at most those of ``largest``."""
    scaled = np.empty(4096, np.float32)
    words = scaled.view(np.uint32)
    for start in range(0, values.size, 4096):
        part = values[start : start + 4096]
        out = halves[start : start + 4096]
        for i in range(part.size):
            scaled[i] = np.float32(np.float64(part[i]) * factor)
        for i in range(part.size):
            word = np.uint32(words[i] & np.uint32(0x7FFFFFFF))
            rounded = np.uint32((word + np.uint32(0xFFF) + ((word >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13))
            normal = np.uint32(rounded - np.uint32(112 << 10))
            tiny = np.uint32(np.int32(np.rint(min(abs(scaled[i]), np.float32(1.0)) * np.float32(2.0**24))))
            half = normal if word >= np.uint32(0x38800000) else tiny  # 2^-14, the smallest normal half
            sign = (words[i] >> np.uint32(16)) & np.uint32(0x8000)
            out[i] = np.uint16(min(half, largest) | sign)


@kernel
def _add_fp16(halves: NDArray[Any], factor: float, accumulator: Accumulator, weight: np.floating) -> None:
    """Add ``weight`` times ``half * factor / 2^112``, the middle rounded to float32.

    The exponent and fraction of a half, moved to where float32 has them, are that half divided by 2^112.
    """
    words = np.empty(4096, np.uint32)
    values = words.view(np.float32)
    for start in range(0, accumulator.size, 4096):
        part = accumulator[start : start + 4096]
        source = halves[start : start + 4096]
        for i in range(part.size):
            half = np.uint32(source[i])
            words[i] = ((half & np.uint32(0x8000)) << np.uint32(16)) | ((half & np.uint32(0x7FFF)) << np.uint32(13))
        for i in range(part.size):
            part[i] += weight * np.float32(np.float64(values[i]) * factor)
