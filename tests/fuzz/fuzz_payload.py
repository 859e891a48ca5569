"""Throw bytes at the payload reader: it reads them or raises one of our own errors, within bounded memory.

Run with coverage guidance where atheris is installed, else with blind mutations from a seed::

    python -m tests.fuzz.fuzz_payload --seconds 60

The first byte of an input chooses a pipeline and whether the checksums are made right again after the damage; without the
latter, hardly any input would come past them.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from contextlib import nullcontext

try:
    import atheris
except ImportError:
    atheris = None

# Numba cannot compile code that has been instrumented.
WITH_KERNELS = [f"fedllm.codecs.{name}" for name in ("dense", "largest", "quantize_kernels", "rice", "tensor")]

guided = atheris is not None and __name__ == "__main__"
with atheris.instrument_imports(include=["fedllm"], exclude=WITH_KERNELS) if guided else nullcontext():
    from fedllm.codecs.payload import open_payload
    from fedllm.errors import AgreementError, UpdateError
    from tests.payload_tools import BASE, LAYOUT, draw, encode, reseal, reseal_head

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
)
SAMPLES = tuple(encode(pipeline)[0] for pipeline in PIPELINES)
REFERENCE = draw(seed=99)


def read_all(data: bytes) -> bool:
    """Return whether the bytes are a payload; any exception but ours goes through."""
    try:
        with open_payload(data, layout=LAYOUT, base=BASE, max_bytes=1 << 20, reference=REFERENCE) as payload:
            payload.verify()
            for spec in LAYOUT.tensors:
                assert payload.read(spec.name).shape == spec.shape
    except (UpdateError, AgreementError):
        return False
    return True


def one_input(data: bytes) -> None:
    """Build a payload from a fuzzer's bytes and read it."""
    if len(data) < 4:
        read_all(data)
        return
    sample, way, rest = SAMPLES[data[0] % len(SAMPLES)], data[1] % 4, data[2:]
    if way == 0:
        read_all(rest)
    elif way == 1:
        read_all(reseal(sample, lambda segments: segments.__setitem__(rest[0] % len(segments), rest[1:])))
    elif way == 2:
        read_all(reseal(sample, lambda segments: _overwrite(segments, rest)))
    else:
        read_all(reseal_head(sample, lambda body: _overwrite_bytes(body, rest)))


def _overwrite(segments: list[bytes], rest: bytes) -> None:
    index = rest[0] % len(segments)
    body = bytearray(segments[index])
    _overwrite_bytes(body, rest[1:])
    segments[index] = bytes(body)


def _overwrite_bytes(body: bytearray, rest: bytes) -> None:
    for at, value in zip(rest[::2], rest[1::2], strict=False):
        body[at * 7 % len(body)] = value


def _blind(seconds: float, seed: int) -> int:
    random_ = random.Random(seed)
    end, inputs = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        one_input(random_.randbytes(random_.randrange(4, 40)))
        inputs += 1
    return inputs


def main() -> None:
    """Fuzz for a while; a finding ends the process with its traceback."""
    parser = argparse.ArgumentParser(description="Fuzz the payload reader.")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    if atheris is None:
        print(f"blind: {_blind(arguments.seconds, arguments.seed)} inputs, no finding")
        return
    atheris.Setup([sys.argv[0], f"-max_total_time={arguments.seconds}", f"-seed={arguments.seed + 1}"], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
