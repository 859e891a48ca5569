"""Write and open payloads: the bytes in which a state or an update travels and rests.

::

    info = encode_payload(path, arrays, layout, kind="update", round_=3, base=fingerprint, pipeline="bf16")
    with open_payload(path, layout=layout, base=fingerprint, max_bytes=1 << 30) as payload:
        for name in payload.names:
            payload.add_to(name, sums[name], weight)

Equal input gives equal bytes on every machine (with the same version of zstd, where a pipeline uses it).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fedllm.codecs.container import DIGEST_BYTES, Head, PayloadHeader, PayloadKind, checksum
from fedllm.codecs.pipeline import Pipeline, parse
from fedllm.codecs.reader import PayloadReader, open_payload
from fedllm.codecs.stage import Kind, Values
from fedllm.codecs.tensor import TensorCodec, bind
from fedllm.errors import ConfigError, explain
from fedllm.update import Arrays, Layout, TensorSpec, check_array, check_arrays

__all__ = ["PayloadHeader", "PayloadInfo", "PayloadReader", "encode_payload", "open_payload"]


@dataclass(frozen=True)
class PayloadInfo:
    """What :func:`encode_payload` wrote.

    Attributes:
        header: The payload's header.
        num_bytes: Its size.
        digest: Its digest, 32 hexadecimal digits, equal to :attr:`PayloadReader.digest`.
        decoded: With ``want_decoded``, the arrays that a reader will read, bit for bit; else None.
    """

    header: PayloadHeader
    num_bytes: int
    digest: str
    decoded: Arrays | None


def encode_payload(
    sink: BinaryIO | Path,
    arrays: Mapping[str, Values],
    layout: Layout,
    *,
    kind: PayloadKind,
    round_: int,
    base: str,
    pipeline: Pipeline | str,
    reference_id: str = "",
    reference: Mapping[str, Values] | None = None,
    is_difference: bool = False,
    seed: int = 0,
    site: str = "",
    site_index: int = 0,
    want_decoded: bool = False,
) -> PayloadInfo:
    """Write arrays as a payload.

    Memory beyond the arguments is one tensor and its segment (a sink that cannot seek needs the whole payload).

    Args:
        sink: A path, which is overwritten, or a binary stream, written from its current position.
        arrays: float32 by name, in the layout's shapes.
        layout: What both ends agreed on.
        kind: ``state`` or ``update``.
        round_: The federation's round.
        base: Fingerprint of the frozen base.
        pipeline: How to encode.
        reference_id: Id of the state that the receiver holds, where the values that travel are a difference to it.
        reference: That state's arrays as the receiver decoded them, for pipelines with ``needs_reference``.
        is_difference: The arrays are a difference to the reference already (``delta`` does not subtract again), as for
            updates that were clipped or carry a residual.
        seed: The run's seed, for stochastic rounding and `randk`.
        site: The sender's name, for stochastic rounding.
        site_index: The sender's number in the round-robin of `segment`.
        want_decoded: Also return what the receiver will decode: a difference where a difference travels.

    Raises:
        ConfigError: The pipeline does not cover the layout, or its reference is missing.
        LayoutError: Arrays or reference do not fit the layout.
        NonFiniteError: They hold NaN or infinity, or their difference overflows.
    """
    pipeline = parse(pipeline) if isinstance(pipeline, str) else pipeline
    check_arrays(arrays, layout, "the arrays to encode")
    _check_reference(pipeline, layout, reference_id, reference, is_difference)
    header = PayloadHeader(
        kind=kind,
        round=round_,
        layout=layout.digest,
        base=base,
        pipeline=pipeline.wire_text,
        reference=reference_id,
        seed=seed if pipeline.carries_seed else 0,
        site_index=site_index if pipeline.has(Kind.SEGMENT) else 0,
    )
    encoder = _Encoder(pipeline, layout, header, seed, site)
    subtracted = reference if pipeline.has(Kind.DIFFERENCE) and not is_difference else None
    with _seekable(sink) as file:
        start = file.tell()
        file.write(bytes(encoder.num_head_bytes))
        for name, codec in encoder.codecs.items():
            values = _flat(arrays[name] if subtracted is None else _difference(arrays, subtracted, layout[name]))
            file.write(
                encoder.encode(codec, values, None if reference is None else _flat(reference[name]), want_decoded)
            )
        end = file.tell()
        head = encoder.head.to_bytes()
        file.seek(start)
        file.write(head)
        file.seek(end)
    return PayloadInfo(header, end - start, head[-DIGEST_BYTES:].hex(), encoder.decoded if want_decoded else None)


class _Encoder:
    """The segments of one payload, in order, and the table that they leave."""

    def __init__(self, pipeline: Pipeline, layout: Layout, header: PayloadHeader, seed: int, site: str) -> None:
        self.codecs = bind(pipeline, layout, header.round, header.seed, header.site_index)
        self.decoded: Arrays = {}
        self._layout, self._header, self._seed, self._site = layout, header, seed, site
        self._rows: list[tuple[int, int]] = []

    @property
    def num_head_bytes(self) -> int:
        """Size of the head, whatever the segments will be."""
        return Head(self._header, ((0, 0),) * len(self.codecs)).num_bytes

    @property
    def head(self) -> Head:
        """The head of the segments encoded so far."""
        return Head(self._header, tuple(self._rows))

    def encode(self, codec: TensorCodec, values: Values, reference: Values | None, want_decoded: bool) -> bytes:
        """Return the next tensor's segment, and keep what a reader will make of it."""
        segment = codec.encode(values, reference, self._seed, self._site)
        self._rows.append((len(segment), checksum(segment)))
        if want_decoded:
            shape = self._layout[codec.view.name].shape
            self.decoded[codec.view.name] = codec.decode(codec.open(segment, reference)).reshape(shape)
        return segment


def _difference(arrays: Mapping[str, Values], reference: Mapping[str, Values], spec: TensorSpec) -> Values:
    with np.errstate(over="ignore"):
        difference = np.asarray(arrays[spec.name] - reference[spec.name])
    check_array(difference, spec, "the difference to the reference")
    return difference


def _flat(array: Values) -> Values:
    return np.ascontiguousarray(array).reshape(-1)


def _check_reference(
    pipeline: Pipeline,
    layout: Layout,
    reference_id: str,
    reference: Mapping[str, Values] | None,
    is_difference: bool,
) -> None:
    is_difference_on_wire = is_difference or pipeline.has(Kind.DIFFERENCE)
    subtracts = pipeline.has(Kind.DIFFERENCE) and not is_difference
    where = f"pipeline {pipeline}"
    if is_difference_on_wire and not reference_id:
        raise ConfigError(explain("a difference needs the id of its reference", where=where))
    if reference_id and not is_difference_on_wire:
        raise ConfigError(explain("absolute values have no reference", found=f"id {reference_id!r}", where=where))
    if pipeline.is_partial and not is_difference_on_wire:
        fix = "Put delta in front."
        raise ConfigError(explain("segment and mask leave out coordinates of a state", where=where, fix=fix))
    if (subtracts or pipeline.decoding_needs_reference) and reference is None:
        raise ConfigError(explain("the pipeline needs the reference's arrays", where=where))
    if reference is not None:
        check_arrays(reference, layout, "the reference")


@contextmanager
def _seekable(sink: BinaryIO | Path) -> Iterator[BinaryIO]:
    """Yield a stream that can seek; what a stream that cannot is given, it gets at the end."""
    if isinstance(sink, Path):
        with sink.open("wb") as file:
            yield file
    elif sink.seekable():
        yield sink
    else:
        buffer = io.BytesIO()
        yield buffer
        sink.write(buffer.getbuffer())
