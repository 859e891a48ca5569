"""Open a payload and decode it tensor by tensor, trusting nothing in it.

Opening checks the head against what the receiver knows (layout, base, size). A tensor's segment is checked for its
checksum, structure and finiteness before its first use. Nothing larger than the layout's own tensor is ever allocated.
"""

from __future__ import annotations

import functools
import mmap
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fedllm.codecs.container import Head, PayloadHeader, PayloadKind, checksum, read_head
from fedllm.codecs.pipeline import Pipeline, parse
from fedllm.codecs.stage import Accumulator, Values
from fedllm.codecs.tensor import Opened, TensorCodec, bind
from fedllm.errors import (
    AgreementError,
    ConfigError,
    CorruptPayloadError,
    LayoutError,
    NonFiniteError,
    OversizedPayloadError,
    PayloadVersionError,
    TruncatedPayloadError,
    explain,
)
from fedllm.update import Layout, check_array


def open_payload(
    source: Path | bytes | memoryview,
    *,
    layout: Layout,
    base: str,
    max_bytes: int | None = None,
    kind: PayloadKind | None = None,
    round_: int | None = None,
    pipeline: Pipeline | None = None,
    reference_id: str | None = None,
    reference: Mapping[str, Values] | None = None,
) -> PayloadReader:
    """Open a payload and check its head; the caller closes the reader.

    Args:
        source: A file (mapped, not read) or the bytes.
        layout: What both ends agreed on.
        base: Fingerprint of the base that the receiver holds.
        max_bytes: Largest payload to accept, None for the layout's own bound only.
        kind: If given, the only kind to accept.
        round_: If given, the only round to accept.
        pipeline: If given, the only pipeline to accept.
        reference_id: If given, the only reference to accept; empty for absolute values.
        reference: That state's arrays, for pipelines with ``decoding_needs_reference`` and for :meth:`restore`.

    Raises:
        TruncatedPayloadError: Fewer bytes than announced.
        OversizedPayloadError: More bytes than announced, than ``max_bytes`` or than the layout can need.
        CorruptPayloadError: Not a payload, or a damaged head.
        PayloadVersionError: Written by another format version, or with a stage unknown here.
        LayoutError: Written for another layout.
        AgreementError: Another base, kind, round, pipeline or reference.
        ConfigError: The pipeline needs a reference to decode, and none is given.
    """
    reader = PayloadReader(source, layout, max_bytes, reference)
    header = reader.header
    wanted = {
        "base": (base, header.base),
        "kind": (kind, header.kind),
        "round": (round_, header.round),
        "pipeline": (pipeline.wire_text if pipeline else None, header.pipeline),
        "reference": (reference_id, header.reference),
    }
    for field, (expected, found) in wanted.items():
        if expected is not None and expected != found:
            reader.close()
            raise AgreementError(
                explain(
                    f"a payload has another {field}", expected=repr(expected), found=repr(found), where=reader.where
                )
            )
    return reader


class PayloadReader:
    """An open payload; made by :func:`open_payload`, closed by its user or by ``with``.

    Attributes:
        header: What the payload says about itself.
        digest: The payload's name, 32 hexadecimal digits.
        num_bytes: Its size.
        where: What error messages call it.
    """

    def __init__(
        self,
        source: Path | bytes | memoryview,
        layout: Layout,
        max_bytes: int | None,
        reference: Mapping[str, Values] | None,
    ) -> None:
        self._layout = layout
        self._reference = reference
        self._checked: set[str] = set()
        self.where = f"payload {source}" if isinstance(source, Path) else "payload"
        mapped = _mapped(source, max_bytes) if isinstance(source, Path) else source
        self._map = mapped if isinstance(mapped, mmap.mmap) else None
        self._bytes = memoryview(mapped).cast("B").toreadonly()
        try:
            self._open(max_bytes)
        except BaseException:
            self.close()
            raise

    def _open(self, max_bytes: int | None) -> None:
        self.num_bytes = len(self._bytes)
        _check_limit(self.num_bytes, max_bytes, self.where)
        head, digest = read_head(self._bytes)
        self.header: PayloadHeader = head.header
        self.digest = digest.hex()
        _check_layout(head, self._layout, self.where)
        self._pipeline = _read_pipeline(self.header, self._layout)
        self._codecs = bind(self._pipeline, self._layout, self.header.round, self.header.seed, self.header.site_index)
        self._segments: dict[str, tuple[int, int, int]] = {}
        at = head.num_bytes
        for name, (length, expected) in zip(self._layout.names, head.rows, strict=True):
            self._check_length(name, length)
            self._segments[name] = (at, at + length, expected)
            at += length
        if at != self.num_bytes:
            error = TruncatedPayloadError if at > self.num_bytes else OversizedPayloadError
            raise error(
                explain(
                    "a payload has another size than it announces", expected=at, found=self.num_bytes, where=self.where
                )
            )
        if self._pipeline.decoding_needs_reference and self._reference is None:
            raise ConfigError(
                explain("decoding needs the reference's arrays", where=f"pipeline {self.header.pipeline}")
            )

    def _check_length(self, name: str, length: int) -> None:
        bound = self._codecs[name].max_bytes
        if length > bound:
            raise OversizedPayloadError(
                explain(
                    f"the segment of {name!r} is larger than its tensor can need",
                    expected=f"at most {bound} bytes",
                    found=f"{length} bytes",
                    where=self.where,
                )
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names in the layout's order."""
        return self._layout.names

    @property
    def is_difference(self) -> bool:
        """Whether the values are a difference to the state that the header names."""
        return bool(self.header.reference)

    @property
    def is_partial(self) -> bool:
        """Whether the payload says nothing about some coordinates (see :meth:`coverage`)."""
        return self._pipeline.is_partial

    def read(self, name: str) -> Values:
        """Return one tensor as it travelled, a new float32 array in the layout's shape.

        Where the header names a reference, these values are the difference to it, zero where nothing travelled.

        Raises:
            LayoutError: The layout has no such tensor.
            CorruptPayloadError: The segment's checksum or structure is wrong.
            OversizedPayloadError: A compressed part is larger than the tensor can need.
            NonFiniteError: It holds NaN or infinity.
        """
        values = self._codec(name).decode(self._open_segment(name)).reshape(self._layout[name].shape)
        self._let_go(name)
        return values

    def restore(self, name: str) -> Values:
        """Return one tensor's absolute values: what :meth:`read` gives, plus the reference if it is a difference.

        Raises:
            ConfigError: It is a difference and the payload was opened without the reference's arrays.
            LayoutError, PayloadError, NonFiniteError: As for :meth:`read`; also if the sum overflows.
        """
        values = self.read(name)
        if not self.is_difference:
            return values
        if self._reference is None:
            raise ConfigError(explain("absolute values need the reference's arrays", where=self.where))
        with np.errstate(over="ignore"):
            values += self._flat_reference(name).reshape(values.shape)
        check_array(values, self._layout[name], f"{self.where} added to its reference")
        return values

    def add_to(self, name: str, accumulator: Accumulator, weight: float, weights: Accumulator | None = None) -> None:
        """Add ``weight`` times one tensor to an accumulator, which is left untouched if the tensor is refused.

        With a partial pipeline, sum the weights beside the values and divide by them where they are not zero: that
        averages every coordinate over the sites that sent it.

        Args:
            name: The tensor.
            accumulator: float32 or float64 in the layout's shape, C-contiguous, changed in place.
            weight: A finite factor.
            weights: If given, ``weight`` is added to it at the covered coordinates; same shape.

        Raises:
            LayoutError, PayloadError, NonFiniteError: As for :meth:`read`.
        """
        codec = self._codec(name)
        spec = self._layout[name]
        assert accumulator.shape == spec.shape, f"accumulator {accumulator.shape} for {spec}"
        assert accumulator.flags.c_contiguous, "the accumulator must be C-contiguous"
        codec.add(self._open_segment(name), accumulator.reshape(-1), weight)
        self._let_go(name)
        if weights is not None:
            weights[self.coverage(name)] += weight

    def coverage(self, name: str) -> NDArray[np.bool_]:
        """Return bool in the layout's shape: True where the payload says something about a coordinate."""
        spec = self._layout[name]
        return self._codec(name).coverage(self._flat_reference_or_none(name)).reshape(spec.shape)

    def verify(self) -> None:
        """Check every tensor's checksum, structure and finiteness, keeping none.

        Raises:
            CorruptPayloadError, NonFiniteError: As for :meth:`read`.
        """
        for name in self.names:
            self._open_segment(name)
            self._let_go(name)

    def close(self) -> None:
        """Let go of the bytes; the file is unmapped."""
        self._bytes.release()
        if self._map is not None:
            # An error's traceback may hold views of the map; it is then unmapped when the last of them goes.
            with suppress(BufferError):
                self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _codec(self, name: str) -> TensorCodec:
        if name not in self._codecs:
            raise LayoutError(explain(f"the layout has no tensor {name!r}", where=self.where))
        return self._codecs[name]

    def _flat_reference_or_none(self, name: str) -> Values | None:
        return None if self._reference is None else self._flat_reference(name)

    def _flat_reference(self, name: str) -> Values:
        assert self._reference is not None
        check_array(self._reference[name], self._layout[name], "the reference")
        return np.ascontiguousarray(self._reference[name]).reshape(-1)

    def _open_segment(self, name: str) -> Opened:
        codec = self._codec(name)
        start, stop, expected = self._segments[name]
        segment = self._bytes[start:stop]
        reference = self._flat_reference_or_none(name)
        if name in self._checked:
            return codec.open(segment, reference)
        try:
            _check_sum(segment, expected)
            opened = codec.open(segment, reference)
            codec.check(opened)
        except (CorruptPayloadError, NonFiniteError, OversizedPayloadError) as error:
            raise type(error)(f"{error} In tensor {name!r} of {self.where}.") from error
        self._checked.add(name)
        return opened

    def _let_go(self, name: str) -> None:
        """Take a segment's pages out of this process's memory; a mapped file would stay there as far as it was read.

        They remain in the system's cache, so another reading finds them.
        """
        if self._map is not None:
            start, stop, _ = self._segments[name]
            page = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, page, stop - page)


def _check_sum(segment: memoryview, expected: int) -> None:
    found = checksum(segment)
    if found != expected:
        raise CorruptPayloadError(explain("a segment is damaged", expected=f"{expected:016x}", found=f"{found:016x}"))


def _mapped(path: Path, max_bytes: int | None) -> mmap.mmap:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        _check_limit(size, max_bytes, f"payload {path}")
        if not size:
            raise TruncatedPayloadError(explain("a payload is empty", where=path))
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _check_limit(found: int, max_bytes: int | None, where: str) -> None:
    if max_bytes is not None and found > max_bytes:
        raise OversizedPayloadError(
            explain(
                "a payload is too large", expected=f"at most {max_bytes} bytes", found=f"{found} bytes", where=where
            )
        )


def _check_layout(head: Head, layout: Layout, where: str) -> None:
    if head.header.layout != layout.digest:
        raise LayoutError(
            explain("a payload has another layout", expected=layout.digest, found=head.header.layout, where=where)
        )
    if len(head.rows) != len(layout.tensors):
        raise CorruptPayloadError(
            explain("a payload has another number of segments", expected=len(layout.tensors), found=len(head.rows))
        )


def _read_pipeline(header: PayloadHeader, layout: Layout) -> Pipeline:
    try:
        pipeline = _parse_wire_text(header.pipeline)
        pipeline.check(layout)
    except ConfigError as error:
        raise PayloadVersionError(f"This release cannot read the payload's pipeline. {error}") from error
    return pipeline


@functools.lru_cache(
    maxsize=64
)  # all sites of a run send the same text, and a text with versions never changes meaning
def _parse_wire_text(text: str) -> Pipeline:
    pipeline = parse(text)
    if pipeline.wire_text != text:
        raise CorruptPayloadError(
            explain("a payload's pipeline is not canonical", expected=pipeline.wire_text, found=text)
        )
    return pipeline
