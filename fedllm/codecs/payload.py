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

from fedllm.codecs.container import Head, PayloadHeader, PayloadKind, checksum
from fedllm.codecs.pipeline import Pipeline, parse
from fedllm.codecs.reader import PayloadReader, open_payload
from fedllm.codecs.stage import Kind, Values
from fedllm.codecs.tensor import TensorCodec
from fedllm.errors import ConfigError, explain
from fedllm.update import Arrays, Layout, check_arrays

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
        NonFiniteError: They hold NaN or infinity.
    """
    pipeline = parse(pipeline) if isinstance(pipeline, str) else pipeline
    pipeline.check(layout)
    check_arrays(arrays, layout, "the arrays to encode")
    _check_reference(pipeline, layout, reference_id, reference, is_difference)
    header = PayloadHeader(
        kind=kind,
        round=round_,
        layout=layout.digest,
        base=base,
        pipeline=pipeline.wire_text,
        reference=reference_id,
        site_index=site_index,
    )
    decoded: Arrays | None = {} if want_decoded else None
    rows = []
    with _seekable(sink) as file:
        start = file.tell()
        file.write(bytes(len(Head(header, ((0, 0),) * len(layout.tensors)).to_bytes())))
        for spec in layout.tensors:
            values = np.ascontiguousarray(arrays[spec.name]).reshape(-1)
            if reference is not None and not is_difference and pipeline.has(Kind.DIFFERENCE):
                values = values - reference[spec.name].reshape(-1)
            codec = TensorCodec(pipeline.branch(spec.role), spec, header)
            segment = codec.encode(values, seed, site)
            file.write(segment)
            rows.append((len(segment), checksum(segment)))
            if decoded is not None:
                decoded[spec.name] = codec.decode(codec.open(segment)).reshape(spec.shape)
        end = file.tell()
        head = Head(header, tuple(rows))
        file.seek(start)
        file.write(head.to_bytes())
        file.seek(end)
    return PayloadInfo(header, end - start, head.digest, decoded)


def _check_reference(
    pipeline: Pipeline,
    layout: Layout,
    reference_id: str,
    reference: Mapping[str, Values] | None,
    is_difference: bool,
) -> None:
    differs = is_difference or pipeline.has(Kind.DIFFERENCE)
    if differs != bool(reference_id):
        problem = "a difference needs the id of its reference" if differs else "absolute values have no reference"
        raise ConfigError(explain(problem, found=f"reference_id={reference_id!r}", where=f"pipeline {pipeline}"))
    if pipeline.has(Kind.DIFFERENCE) and not is_difference and reference is None:
        raise ConfigError(explain("the pipeline needs the reference's arrays", where=f"pipeline {pipeline}"))
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
