"""Make payloads in tests, and damage them in ways that keep their checksums right."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping

import numpy as np
import xxhash

from fedllm.codecs.container import DIGEST_BYTES, Head, checksum, read_head
from fedllm.codecs.payload import PayloadInfo, encode_payload
from fedllm.update import Arrays, Layout, TensorSpec

BASE = "base-fingerprint"
REFERENCE_ID = "state-of-round-6"

LAYOUT = Layout(
    (
        TensorSpec("q.lora_A", (4, 33), role="lora_A"),
        TensorSpec("q.lora_B", (17, 4), role="lora_B"),
        TensorSpec("scalar", ()),
    )
)


def draw(layout: Layout = LAYOUT, seed: int = 0) -> Arrays:
    """Heavy-tailed arrays for a layout."""
    rng = np.random.default_rng(seed)
    return {
        spec.name: rng.standard_t(3, spec.shape or 1).astype(np.float32).reshape(spec.shape) for spec in layout.tensors
    }


def encode(
    pipeline: str, arrays: Mapping[str, np.ndarray] | None = None, layout: Layout = LAYOUT, **changes: object
) -> tuple[bytes, PayloadInfo]:
    """Encode arrays as an update of round 7 of site 4, with a reference where the pipeline needs one."""
    sink = io.BytesIO()
    settings: dict[str, object] = {
        "kind": "update",
        "round_": 7,
        "base": BASE,
        "seed": 11,
        "site": "s4",
        "site_index": 4,
    }
    if "delta" in pipeline:
        settings |= {"reference_id": REFERENCE_ID, "reference": draw(layout, 99)}
    settings |= {"want_decoded": True, **changes}
    info = encode_payload(sink, draw(layout) if arrays is None else arrays, layout, pipeline=pipeline, **settings)  # type: ignore[arg-type]
    return sink.getvalue(), info


def reseal(payload: bytes, change: Callable[[list[bytes]], object]) -> bytes:
    """Change the segments of a payload in place and write all checksums and lengths anew."""
    head, segments = read_head(memoryview(payload))[0], segments_of(payload)
    change(segments)
    rows = tuple((len(segment), checksum(segment)) for segment in segments)
    return Head(head.header, rows).to_bytes() + b"".join(segments)


def segments_of(payload: bytes) -> list[bytes]:
    """Cut a payload's segments out of it."""
    head, _ = read_head(memoryview(payload))
    segments, at = [], head.num_bytes
    for length, _ in head.rows:
        segments.append(payload[at : at + length])
        at += length
    return segments


def reseal_head(payload: bytes, change: Callable[[bytearray], object]) -> bytes:
    """Change the head's bytes in place and write its digest anew."""
    size = read_head(memoryview(payload))[0].num_bytes
    body = bytearray(payload[: size - DIGEST_BYTES])
    change(body)
    return bytes(body) + xxhash.xxh3_128_digest(bytes(body)) + payload[size:]
