"""An adapter of a given size, as arrays and as payloads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedllm.codecs.payload import encode_payload, open_payload
from fedllm.codecs.reader import PayloadReader
from fedllm.update import Arrays, Layout, TensorSpec

NUM_ARRAYS = 448
"""As many as a LoRA on all linear layers of a model with 32 blocks has."""

BASE = "benchmark"


def layout_of(megabytes: int) -> Layout:
    """Return a layout of so many million bytes of float32."""
    length = megabytes * 1_000_000 // 4 // NUM_ARRAYS // 8
    return Layout(
        tuple(TensorSpec(f"layers.{index}.lora_A", (8, length), role="lora_A") for index in range(NUM_ARRAYS))
    )


def draw(layout: Layout, seed: int) -> Arrays:
    """Return Gaussian values."""
    draws = np.random.default_rng(seed)
    return {spec.name: draws.standard_normal(spec.shape, np.float32) for spec in layout.tensors}


def encode(path: Path, layout: Layout, *, kind: str, pipeline: str, seed: int) -> Path:
    """Write a payload of drawn values."""
    arrays = draw(layout, seed)
    encode_payload(path, arrays, layout, kind=kind, round_=1, base=BASE, pipeline=pipeline, seed=seed)  # type: ignore[arg-type]
    return path


def open_update(path: Path, layout: Layout) -> PayloadReader:
    """Open an update as the round loop does."""
    return open_payload(path, layout=layout, base=BASE, kind="update", round_=1)
