"""Size, error and speed of codec pipelines, one thread.

``python -m benchmarks.codecs --json`` encodes and decodes one tensor of 460,800 values (as many as the rank-8 q,v adapter
of SmolLM2-135M has) drawn from a Gaussian and from Student's t with three degrees of freedom, and real deltas: those of
three rounds of the demo's federation, which is run for them first (:mod:`benchmarks.deltas`, some minutes). ``--real FILE``
takes them from a file that ``benchmarks.deltas`` wrote, or any safetensors file, or a payload with ``--layout``;
``--no-real`` leaves them out.

Keys: ``num_parameters``, ``memcpy_gb_per_s``, ``real_kurtosis`` (of the real deltas' tensors, their mean; 3 for a Gaussian,
1.8 for a uniform draw, 1 for two values of equal magnitude), and ``pipelines``, by the pipeline's text:

- ``bits_per_param``: the whole payload, its head included.
- ``rel_l2_gaussian``, ``rel_l2_student_t``, ``rel_l2_real``: norm of the error over norm of the values; the last is null
  with ``--no-real``.
- ``held_back_real``: with error feedback over the rounds of the real deltas, as if one site had made them all, the norm of
  what has not travelled after the last over the norm of their sum; null for deltas without rounds.
- ``encode_gb_per_s``, ``decode_add_gb_per_s``: float32 bytes of the adapter per second. Decoding counts opening, checksums,
  checks, and adding to float64 sums.
- ``fraction_of_memcpy``, ``encode_fraction_of_memcpy``: of the speed at which NumPy copies the same bytes.
- ``adapter_encode_gb_per_s``, ``adapter_decode_add_gb_per_s``: the same with these values as that adapter's 120 tensors;
  the work that each tensor needs, whatever its size, shows here.

Speeds, and the copy beside them, are medians of repeats.
"""

from __future__ import annotations

import argparse
import functools
import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.common import machine, median_seconds, show
from benchmarks.deltas import by_round, collect
from fedllm.codecs.container import read_head
from fedllm.codecs.feedback import ErrorFeedback, norm
from fedllm.codecs.payload import encode_payload, open_payload
from fedllm.codecs.pipeline import parse
from fedllm.codecs.stage import Values
from fedllm.errors import ConfigError, explain
from fedllm.rng import generator
from fedllm.update import Arrays, Layout, TensorSpec

NUM_PARAMETERS = 460_800
NUM_LAYERS = 30
MODULES = {
    "q_proj": {"lora_A": (8, 576), "lora_B": (576, 8)},
    "v_proj": {"lora_A": (8, 576), "lora_B": (192, 8)},
}
PIPELINES = (
    "fp32",
    "bf16",
    "fp16",
    "int8:256",
    "int8:256:sr",
    "fp8:256",
    "int4:64",
    "nf4:64",
    "q2:64",
    "sign:256",
    "topk:0.1|fp16|rice",
    "topk:0.1|nf4:64|rice",
    "topk:0.01|nf4:64|rice",
    "topk:0.25|q2:64|rice",
    "topk:0.5|sign:1024|rice",
    "randk:0.1|fp32",
    "int8:256|zstd:3",
    "nf4:64|zstd:3",
    "topk:0.1|nf4:64|rice|zstd:3",
)


def layout_of(arrays: Mapping[str, Values]) -> Layout:
    """Return a layout for arrays, in their order."""
    return Layout(tuple(TensorSpec(name, values.shape) for name, values in arrays.items()))


def encoded(pipeline: str, arrays: Mapping[str, Values], layout: Layout, round_: int = 1) -> bytes:
    """Return arrays as a payload."""
    sink = io.BytesIO()
    encode_payload(sink, arrays, layout, kind="update", round_=round_, base="benchmark", pipeline=pipeline, seed=1)
    return sink.getvalue()


def add_all(payload: bytes, layout: Layout, sums: Mapping[str, np.ndarray]) -> None:
    """Open a payload and add its tensors to float64 sums."""
    with open_payload(payload, layout=layout, base="benchmark") as reader:
        for name in reader.names:
            reader.add_to(name, sums[name], 0.125)


def relative_error(pipeline: str, arrays: Mapping[str, Values]) -> float:
    """Return the norm of what a pipeline loses over the norm of the values."""
    layout = layout_of(arrays)
    lost = scale = 0.0
    with open_payload(encoded(pipeline, arrays, layout), layout=layout, base="benchmark") as reader:
        for name, values in arrays.items():
            lost += float(np.square(reader.read(name) - values, dtype=np.float64).sum())
            scale += float(np.square(values, dtype=np.float64).sum())
    return float(np.sqrt(lost / scale)) if scale else 0.0


def held_back(pipeline: str, deltas: Arrays) -> float | None:
    """Return what error feedback still holds back after all rounds, over the sum of the deltas."""
    rounds = by_round(deltas)
    if not rounds:
        return None
    layout, feedback = layout_of(rounds[0]), ErrorFeedback()
    residual: Arrays | None = None
    for round_, delta in enumerate(rounds, 1):
        compensated = feedback.compensate(delta, residual)
        with open_payload(encoded(pipeline, compensated, layout, round_), layout=layout, base="benchmark") as reader:
            residual = feedback.residual(compensated, {name: reader.read(name) for name in reader.names})
    assert residual is not None
    return norm(residual) / norm({name: np.sum([delta[name] for delta in rounds], axis=0) for name in layout.names})


def measure(pipeline: str, repeats: int, real: Arrays | None) -> dict[str, float | None]:
    """Return the figures of one pipeline."""
    gaussian, student = {"tensor": draw("gaussian")}, {"tensor": draw("student")}
    encode_s, decode_s = measure_speed(pipeline, gaussian, repeats)
    adapter_encode_s, adapter_decode_s = measure_speed(pipeline, split(draw("gaussian")), repeats)
    memcpy_s = memcpy_seconds(repeats)
    billions = 4 * NUM_PARAMETERS / 1e9
    return {
        "bits_per_param": 8 * len(encoded(pipeline, gaussian, layout_of(gaussian))) / NUM_PARAMETERS,
        "rel_l2_gaussian": relative_error(pipeline, gaussian),
        "rel_l2_student_t": relative_error(pipeline, student),
        "rel_l2_real": None if real is None else relative_error(pipeline, real),
        "held_back_real": None if real is None else held_back(pipeline, real),
        "encode_gb_per_s": billions / encode_s,
        "decode_add_gb_per_s": billions / decode_s,
        "fraction_of_memcpy": memcpy_s / decode_s,
        "encode_fraction_of_memcpy": memcpy_s / encode_s,
        "adapter_encode_gb_per_s": billions / adapter_encode_s,
        "adapter_decode_add_gb_per_s": billions / adapter_decode_s,
    }


def measure_speed(pipeline: str, arrays: Mapping[str, Values], repeats: int) -> tuple[float, float]:
    """Return the median seconds of encoding and of decoding and adding, after a first call that compiles."""
    layout = layout_of(arrays)
    payload = encoded(pipeline, arrays, layout)
    sums = {name: np.zeros(values.shape) for name, values in arrays.items()}
    add_all(payload, layout, sums)
    encode_s = median_seconds(functools.partial(encoded, pipeline, arrays, layout), repeats)
    return encode_s, median_seconds(functools.partial(add_all, payload, layout, sums), repeats)


def split(values: Values) -> Arrays:
    """Cut float32 [460800] into the tensors of the rank-8 q,v adapter of SmolLM2-135M."""
    arrays, start = {}, 0
    for layer in range(NUM_LAYERS):
        for module, shapes in MODULES.items():
            for factor, shape in shapes.items():
                name = f"base_model.model.model.layers.{layer}.self_attn.{module}.{factor}.weight"
                arrays[name] = values[start : start + math.prod(shape)].reshape(shape)
                start += math.prod(shape)
    assert start == len(values)
    return arrays


@functools.cache
def draw(distribution: str) -> Values:
    """Return the benchmark's float32 [460800] values."""
    stream = generator(0, purpose=f"benchmark codecs {distribution}")
    gaussian = distribution == "gaussian"
    values = stream.standard_normal(NUM_PARAMETERS) if gaussian else stream.standard_t(3, NUM_PARAMETERS)
    return (1e-3 * values).astype(np.float32)


def memcpy_seconds(repeats: int) -> float:
    """Return how long it takes to copy the adapter's float32 bytes."""
    source = draw("gaussian")
    target = np.empty_like(source)
    return median_seconds(lambda: np.copyto(target, source), repeats)


def load_real(path: Path, layout_path: Path | None) -> Arrays:
    """Read a real delta.

    Raises:
        ConfigError: A payload is given without its layout.
    """
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file  # only where it is asked for

        return {name: values.astype(np.float32) for name, values in load_file(path).items()}
    if layout_path is None:
        raise ConfigError(explain("a payload needs --layout", found=path, fix="Give the layout's JSON file."))
    layout = Layout.from_json(layout_path.read_text(encoding="utf-8"))
    base = read_head(memoryview(path.read_bytes()))[0].header.base
    with open_payload(path, layout=layout, base=base) as reader:
        return {name: reader.read(name) for name in reader.names}


def kurtosis(arrays: Arrays) -> float:
    """Return the mean kurtosis of the tensors; one of zeros, as a first delta of A is, has none."""
    found = []
    for values in arrays.values():
        squares = np.square(values, dtype=np.float64)
        if squares.any():
            found.append(float(np.square(squares).mean() / squares.mean() ** 2))
    return float(np.mean(found))


def main() -> None:
    """Measure all pipelines and print them."""
    parser = argparse.ArgumentParser(description="Measure codec pipelines.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--repeats", type=int, default=15, help="repeats of every timing")
    parser.add_argument("--pipeline", action="append", help="measure this pipeline instead (may be repeated)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--real", type=Path, help="real deltas: .safetensors, or a payload; else the demo is run")
    source.add_argument("--no-real", action="store_true", help="measure drawn values alone")
    parser.add_argument("--layout", type=Path, help="the layout's JSON file, for a payload")
    arguments = parser.parse_args()
    real = None if arguments.no_real else load_real(arguments.real, arguments.layout) if arguments.real else collect()
    names = [str(parse(text)) for text in arguments.pipeline or PIPELINES]
    pipelines = {name: measure(name, arguments.repeats, real) for name in names}
    memcpy = 4 * NUM_PARAMETERS / 1e9 / memcpy_seconds(arguments.repeats)
    rest = {"num_parameters": NUM_PARAMETERS, "memcpy_gb_per_s": memcpy, "real_kurtosis": real and kurtosis(real)}
    if arguments.json:
        show({**rest, "pipelines": pipelines, "machine": machine()}, as_json=True)
    else:
        _print_table(pipelines)


def _print_table(pipelines: Mapping[str, Mapping[str, float | None]]) -> None:
    columns = list(next(iter(pipelines.values())))
    print(" " * 28 + " ".join(f"{index:>8}" for index in range(len(columns))))
    for name, row in pipelines.items():
        cells = ("       -" if row[column] is None else f"{row[column]:8.4f}" for column in columns)
        print(f"{name:28}" + " ".join(cells))
    for index, column in enumerate(columns):
        print(f"{index}: {column}")


if __name__ == "__main__":
    main()
