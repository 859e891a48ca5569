"""Throw bytes at the payload reader: it reads them or raises one of our own errors, within bounded memory.

::

    python -m tests.fuzz.fuzz_payload --seconds 60            # led by coverage, with atheris (the extra `fuzz`)
    python -m tests.fuzz.fuzz_payload --seconds 15 --blind    # random damage to the compiled kernels

Led by coverage, the kernels run as plain Python: the fuzzer then sees their branches, and an index beyond an array is an
error. Its corpus begins with whole payloads and grows from run to run in ``.fuzz/corpus``; an input that breaks a rule is
left in ``.fuzz``. Blind, the kernels are those that a server runs, compiled here with their bounds checked.

The first byte of an input chooses a pipeline, the second whether the checksums are made right again after the damage;
without the latter, hardly any input would come past them.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
import tracemalloc
import warnings
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

is_main = __name__ == "__main__"
guided = is_main and atheris is not None and "--blind" not in sys.argv
if is_main:  # before numba is imported, which reads these once
    os.environ["NUMBA_DISABLE_JIT" if guided else "NUMBA_BOUNDSCHECK"] = "1"
    os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp()  # numba's cache would mix up code with and without checks

with atheris.instrument_imports(include=["fedllm"]) if guided else nullcontext():
    import numpy as np

    from fedllm.codecs.payload import open_payload
    from fedllm.errors import AgreementError, UpdateError
    from tests.payload_tools import BASE, LAYOUT, draw, encode, reseal, reseal_head, segments_of

PIPELINES = (
    "fp32",
    "bf16",
    "fp16",
    "int8:8:sr",
    "int4:64:f32",
    "fp8",
    "nf4",
    "q2",
    "sign",
    "delta|topk:0.2|nf4|rice|zstd:3",
    "delta|segment:3|mask:0.5|topk:0.5|fp16|rice",
    "randk:0.4|fp32|zstd:1",
    "delta|topk:0.3|sign:8|rice",
    "fp32;lora_B=topk:0.1|fp32|rice;lora_A=q2:8:f32",
)
RAW, SEGMENT, OVERWRITE, HEAD = range(4)
REFERENCE = draw(seed=99)
with np.errstate(over="ignore"):  # splitmix64 wraps round, of which plain Python warns
    SAMPLES = tuple(encode(pipeline)[0] for pipeline in PIPELINES)
MAX_MEMORY = 64_000 + 8 * LAYOUT.num_bytes
"""Bytes that one input may take: objects and tracebacks, and a few arrays of the layout's size."""

FOLDER = Path(".fuzz")


def read_all(data: bytes) -> bool:
    """Return whether the bytes are a payload that reads and adds up alike; any exception but ours goes through."""
    try:
        with open_payload(data, layout=LAYOUT, base=BASE, max_bytes=1 << 20, reference=REFERENCE) as payload:
            payload.verify()
            for spec in LAYOUT.tensors:
                values = payload.read(spec.name)
                assert values.shape == spec.shape
                assert np.isfinite(values).all(), spec.name
                sums = np.zeros(spec.shape)
                payload.add_to(spec.name, sums, 1.0)
                assert np.array_equal(sums, values), spec.name
    except (UpdateError, AgreementError):
        return False
    return True


def one_input(data: bytes) -> None:
    """Build a payload from a fuzzer's bytes and read it."""
    if len(data) < 4:
        read_all(data)
        return
    sample, way, rest = SAMPLES[data[0] % len(SAMPLES)], data[1] % 4, data[2:]
    if way == RAW:
        read_all(rest)
    elif way == SEGMENT:
        read_all(reseal(sample, lambda segments: segments.__setitem__(rest[0] % len(segments), rest[1:])))
    elif way == OVERWRITE:
        read_all(reseal(sample, lambda segments: _overwrite(segments, rest)))
    else:
        read_all(reseal_head(sample, lambda body: _overwrite_bytes(body, rest)))


def bounded(data: bytes) -> None:
    """Read one input, and refuse that it takes more memory than a payload of this layout may.

    Raises:
        AssertionError: It does.
    """
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    one_input(data)
    taken = tracemalloc.get_traced_memory()[1] - before
    assert taken <= MAX_MEMORY, f"{taken} bytes for an input of {len(data)}"


def seeds() -> list[bytes]:
    """Return inputs that come far: each pipeline's payload whole, and each of its segments."""
    found = [bytes((index, RAW)) + sample for index, sample in enumerate(SAMPLES)]
    for index, sample in enumerate(SAMPLES):
        found += [bytes((index, SEGMENT, at)) + segment for at, segment in enumerate(segments_of(sample))]
    return found


def start_counting() -> None:
    """Begin to trace memory, once everything that is compiled or cached at its first use has been used."""
    for data in seeds():
        one_input(data)
    tracemalloc.start()


def blind(num_inputs: int, seed: int, seconds: float = float("inf")) -> int:
    """Read so many inputs, half of them damaged seeds and half random; return how many the time allowed.

    Raises:
        AssertionError: One took too much memory, or gave values that are not finite.
    """
    random_, known = random.Random(seed), seeds()
    end = time.monotonic() + seconds
    for done in range(num_inputs):
        if time.monotonic() >= end:
            return done
        is_random = random_.random() < 0.5
        bounded(random_.randbytes(random_.randrange(4, 700)) if is_random else _damaged(random_, known))
    return num_inputs


def _damaged(random_: random.Random, known: list[bytes]) -> bytes:
    data = bytearray(random_.choice(known))
    for _ in range(random_.randrange(1, 5)):
        data[random_.randrange(len(data))] = random_.randrange(256)
    return bytes(data[: random_.randrange(len(data))] if random_.random() < 0.1 else data)


def _overwrite(segments: list[bytes], rest: bytes) -> None:
    index = rest[0] % len(segments)
    body = bytearray(segments[index])
    _overwrite_bytes(body, rest[1:])
    segments[index] = bytes(body)


def _overwrite_bytes(body: bytearray, rest: bytes) -> None:
    for at, value in zip(rest[::2], rest[1::2], strict=False):
        body[at * 7 % len(body)] = value


def _led_by_coverage(seconds: int, seed: int) -> None:
    corpus = FOLDER / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for data in seeds():
        (corpus / sha256(data).hexdigest()[:16]).write_bytes(data)
    limits = [f"-max_total_time={seconds}", f"-seed={seed + 1}", "-max_len=2048"]
    atheris.Setup([sys.argv[0], *limits, "-keep_seed=1", f"-artifact_prefix={FOLDER}/", str(corpus)], bounded)
    with np.errstate(all="ignore"):  # compiled kernels do not warn either
        atheris.Fuzz()


def main() -> None:
    """Fuzz for a while; a finding ends the process with its traceback."""
    parser = argparse.ArgumentParser(description="Fuzz the payload reader.")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blind", action="store_true", help="random damage to the compiled kernels")
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    start_counting()
    if guided:
        _led_by_coverage(arguments.seconds, arguments.seed)
        return
    if atheris is None:
        print("atheris cannot be imported (the extra `fuzz`): fuzzing blindly, without coverage")
    count = blind(sys.maxsize, arguments.seed, arguments.seconds)
    print(f"blind: {count} inputs, no finding")


if is_main:
    main()
