"""What both ends agree an adapter looks like, and what a site contributes.

A *layout* lists the adapter's tensors: name, shape, dtype and role, in one fixed order. Both ends hold the same layout
before any bytes move; every array that arrives is checked against it before memory is set aside for it.

Sign convention, used everywhere: ``delta = trained - received``. The server's pseudo-gradient is ``-delta``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import LayoutError, NonFiniteError, explain

Arrays = dict[str, NDArray[np.float32]]
"""An adapter's values by tensor name, always float32 in memory; the layout's dtype is what a site trains in."""

DTYPES = ("float32", "bfloat16", "float16")
MAX_TENSORS = 100_000
MAX_PARAMETERS = 1 << 36


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a layout.

    Attributes:
        name: The tensor's name in PEFT's state dict, for example ``...q_proj.lora_A.weight``.
        shape: Its shape; no dimension is zero.
        dtype: What a site trains it in: one of :data:`DTYPES`.
        role: What it is for, so that settings can differ by role: ``lora_A``, ``lora_B``, ``prompt``, ...
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    role: str = "other"

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The tensors of an adapter, in the order in which they travel.

    Raises:
        LayoutError: Names repeat, a dtype is unknown, a dimension is not positive, or bounds are exceeded.
    """

    tensors: tuple[TensorSpec, ...]
    _by_name: dict[str, TensorSpec] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {spec.name: spec for spec in self.tensors})
        if len(self._by_name) != len(self.tensors):
            raise LayoutError(explain("a layout names a tensor twice", where=self._repeated()))
        if len(self.tensors) > MAX_TENSORS or self.num_parameters > MAX_PARAMETERS:
            raise LayoutError(explain("a layout is too large", found=f"{len(self.tensors)} tensors"))
        for spec in self.tensors:
            if spec.dtype not in DTYPES or any(dim < 1 for dim in spec.shape):
                raise LayoutError(
                    explain("a layout holds an impossible tensor", expected=f"dtype in {DTYPES}, dims > 0", found=spec)
                )

    def _repeated(self) -> str:
        names = [spec.name for spec in self.tensors]
        return ", ".join(sorted({name for name in names if names.count(name) > 1})[:3])

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> TensorSpec:
        return self._by_name[name]

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names in order."""
        return tuple(spec.name for spec in self.tensors)

    def only(self, names: Collection[str]) -> Layout:
        """Return the layout of some of the tensors, in the same order: what a part of an adapter travels as.

        Raises:
            LayoutError: A name is unknown.
        """
        wanted = set(names)
        if unknown := sorted(wanted - self._by_name.keys()):
            raise LayoutError(explain("the layout has no such tensor", found=", ".join(unknown[:3])))
        return Layout(tuple(spec for spec in self.tensors if spec.name in wanted))

    @property
    def num_parameters(self) -> int:
        """Elements over all tensors."""
        return sum(spec.size for spec in self.tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in float32."""
        return 4 * self.num_parameters

    def to_json(self) -> str:
        """Return the canonical JSON text: the same layout always gives the same text."""
        rows = [[spec.name, list(spec.shape), spec.dtype, spec.role] for spec in self.tensors]
        return json.dumps(rows, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """Read what :meth:`to_json` wrote.

        Raises:
            LayoutError: The text is not a layout.
        """
        try:
            rows = json.loads(text)
            return cls(tuple(_tensor_from_row(row) for row in rows))
        except LayoutError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise LayoutError(explain("a layout cannot be read", found=error)) from error

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON text, 64 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _tensor_from_row(row: object) -> TensorSpec:
    if not isinstance(row, list) or len(row) != 4:
        raise LayoutError(explain("a layout row is malformed", expected="[name, shape, dtype, role]", found=row))
    name, shape, dtype, role = row
    strings = all(isinstance(item, str) for item in (name, dtype, role))
    if not strings or not isinstance(shape, list) or not all(type(dim) is int for dim in shape):
        raise LayoutError(explain("a layout row is malformed", expected="[str, [int], str, str]", found=row))
    return TensorSpec(name, tuple(shape), dtype, role)


@dataclass(frozen=True)
class Contribution:
    """What one site hands in for one round, apart from the arrays themselves.

    Attributes:
        site: The site's stable name.
        weight: Aggregation weight before normalisation, usually the number of training examples; positive.
        metrics: Small named numbers for people to look at.
        rank: Components that the site trained of a LoRA adapter, 0 for all.
        staleness: How many times the server has moved since the state that the site trained from.
    """

    site: str
    weight: float
    metrics: Mapping[str, float]
    rank: int = 0
    staleness: int = 0


def taken(arrays: Mapping[str, NDArray[np.float32]], layout: Layout) -> Arrays:
    """Return the arrays of a layout's tensors, in its order, out of arrays that hold at least those."""
    return {name: arrays[name] for name in layout.names}


def zeros(layout: Layout) -> Arrays:
    """Return arrays of zeros in the layout's shapes."""
    return {spec.name: np.zeros(spec.shape, np.float32) for spec in layout.tensors}


def digest_arrays(arrays: Mapping[str, NDArray[np.float32]], layout: Layout) -> str:
    """Return the SHA-256 over the arrays' little-endian float32 bytes in the layout's order: what a state is called.

    Both ends compute it after decoding, so a state's name says that they hold the same bits, however it travelled.
    """
    digest = hashlib.sha256(layout.digest.encode())
    for name in layout.names:
        digest.update(np.ascontiguousarray(arrays[name], dtype="<f4").data)
    return digest.hexdigest()


def check_arrays(arrays: Mapping[str, NDArray[np.generic]], layout: Layout, where: str) -> None:
    """Refuse arrays that do not fit the layout or are not finite.

    Raises:
        LayoutError: A name is missing or unknown, or a shape or dtype differs.
        NonFiniteError: A value is NaN or infinite.
    """
    _check_names(arrays, layout, where)
    for spec in layout.tensors:
        check_array(arrays[spec.name], spec, where)


def _check_names(names: Iterable[str], layout: Layout, where: str) -> None:
    found, expected = set(names), set(layout.names)
    if found != expected:
        missing, unknown = sorted(expected - found), sorted(found - expected)
        raise LayoutError(
            explain("arrays do not fit the layout", found=f"missing {missing[:3]}, unknown {unknown[:3]}", where=where)
        )


def check_array(array: NDArray[np.generic], spec: TensorSpec, where: str) -> None:
    """Refuse one array that does not fit its spec or is not finite (see :func:`check_arrays`)."""
    if array.shape != spec.shape or array.dtype != np.float32:
        raise LayoutError(
            explain(
                f"tensor {spec.name!r} does not fit the layout",
                expected=f"float32 {spec.shape}",
                found=f"{array.dtype} {array.shape}",
                where=where,
            )
        )
    if not np.isfinite(array).all():
        raise NonFiniteError(explain(f"tensor {spec.name!r} holds NaN or infinity", where=where))
