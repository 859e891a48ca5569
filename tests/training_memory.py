"""Train in a process of its own and print what it needed: `python -m tests.training_memory '{"quantization": "nf4"}'`.

Measured is the growth of the resident set over what it was before the base was loaded, at its peak (`VmHWM`, which Linux
sets back on request). Before that, a step on the tiny model has everything imported that training imports when it begins,
about 450 MB. Linux only.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from client_app.training import TrainPlan, train
from fedllm.data.sequences import Sequence
from fedllm.home import default_cache_dir
from fedllm.model.build import LoadedBase, attach_adapter, load_base
from fedllm.model.spec import AdapterSpec, BaseSpec, LoraSpec
from tests.bases import load_tiny

ROWS, LENGTH, STEPS = 2, 128, 2
"""The run config's default sizes."""


def train_fully(base: LoadedBase, adapter: AdapterSpec, *, steps: int, rows: int = ROWS, length: int = LENGTH) -> None:
    """Train on batches as full as packing makes them."""
    dtype = base.spec.compute_dtype
    plan = TrainPlan(
        steps=steps,
        first_step=0,
        total_steps=steps,
        batch_size=rows,
        learning_rate=1e-3,
        num_threads=1,
        compute_dtype=dtype,
    )
    train(attach_adapter(base, adapter), full_batches(base, rows, length), plan)


def full_batches(base: LoadedBase, rows: int, length: int) -> Iterator[list[Sequence]]:
    """Yield batches of rows that hold two examples each, all of whose tokens are targets."""
    generator = np.random.default_rng(0)
    segments = (1 + (np.arange(length) >= length // 2)).astype(np.int32)
    targets = np.diff(segments, prepend=0) == 0
    while True:
        ids = generator.integers(0, base.model.config.vocab_size, (rows, length)).astype(np.int32)
        yield [Sequence(row, targets, segments) for row in ids]


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _main() -> None:
    settings = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        train_fully(load_tiny(Path(folder), **settings), LoraSpec(), steps=1, rows=1, length=16)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    base = load_base(BaseSpec(**settings), home=Path(), cache_dir=default_cache_dir(), device="cpu")
    train_fully(base, LoraSpec(), steps=STEPS)
    print(json.dumps({"peak": _resident("VmHWM") - before}))


if __name__ == "__main__":
    _main()
