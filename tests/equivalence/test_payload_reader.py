"""A second reader of payloads, written from docs/wire-format.md alone: no code of the package below this line's imports."""

import hashlib
import io
import json
import struct

import numpy as np
import pytest
import xxhash
import zstandard

from fedllm.codecs.payload import encode_payload
from fedllm.update import Layout, TensorSpec

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def e4m3(code):
    sign, exponent, fraction = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


def signed(width):
    half = 2 ** (width - 1)
    return [max(code - 2 * half if code >= half else code, 1 - half) for code in range(2 * half)]


FORMATS = {
    "int8": (8, 127, signed(8)),
    "int4": (4, 7, signed(4)),
    "fp8": (8, 448, [e4m3(code) for code in range(256)]),
    "nf4": (4, 1, NF4),
    "q2": (2, 1, [-1, -0.45278 / 1.5104176, 0.45278 / 1.5104176, 1]),
    "sign": (1, 1, [-1, 1]),
}


def read_payload(data, rows, reference=None):
    magic, version, zero, header_size, tensors = struct.unpack_from("<8sHHII", data)
    assert (magic, version, zero, tensors) == (bytes.fromhex("89464C500D0A1A0A"), 1, 0, len(rows))
    header = json.loads(data[20 : 20 + header_size])
    at = 20 + header_size + 16 * tensors
    assert data[at : at + 16] == xxhash.xxh3_128_digest(data[:at])
    text = json.dumps(rows, separators=(",", ":"))
    assert header["layout"] == hashlib.sha256(text.encode()).hexdigest()
    table, at, arrays, offset = list(struct.iter_unpack("<QQ", data[20 + header_size : at])), at + 16, {}, 0
    total = sum(int(np.prod(shape)) for _, shape, _, _ in rows)
    for (name, shape, _, role), (size, check) in zip(rows, table, strict=True):
        segment, n = data[at : at + size], int(np.prod(shape))
        assert xxhash.xxh3_64_intdigest(segment) == check
        branches = dict((["", *part.split("=")])[-2:] for part in header["pipeline"].split(";"))
        stages = [stage.split(":") for stage in branches.get(role, branches.get("", "")).split("|")]
        ref = None if reference is None else reference[name].reshape(-1)
        flat = read_segment(segment, n, stages, header, name, offset, total, ref)
        arrays[name], at, offset = flat.reshape(shape), at + size, offset + n
    assert at == len(data)
    return header, arrays


def read_segment(segment, n, stages, header, name, offset, total, ref):
    for stage in reversed(stages):
        if stage[0] == "zstd@1":
            segment = segment[1:] if segment[0] == 0 else zstandard.ZstdDecompressor().decompress(segment[1:])
    positions, before_topk = np.arange(n), None
    for key, *params in stages:
        length = len(positions)
        k = picked(float(params[0]), length) if key in ("mask@1", "topk@1", "randk@1") else 0
        if key == "segment@1":
            parts = int(params[0])
            turn = (header["site_index"] + header["round"]) % parts
            ends = [min(max(total * s // parts - offset, 0), n) for s in (turn, turn + 1)]
            positions = positions[ends[0] : ends[1]]
        elif key == "mask@1":
            order = np.argsort(-np.abs(ref[positions]), kind="stable")
            positions = positions[np.sort(order[:k])]
        elif key == "topk@1":
            before_topk, positions = positions, positions[:k]
        elif key == "randk@1" and k:
            text = f"{header['seed']}\x1f{header['round']}\x1f\x1frandk:{name}"
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
            sizes = [length // k + (j < length % k) for j in range(k)]
            starts = np.cumsum([0, *sizes[:-1]])
            positions = positions[[starts[j] + splitmix(seed, j + 1) % sizes[j] for j in range(k)]]
    values, rest = read_values(segment, len(positions), next(stage for stage in stages if is_format(stage)))
    if before_topk is not None:
        positions = before_topk[read_rice(rest, len(positions))]
    else:
        assert not rest
    flat = np.zeros(n, np.float32)
    flat[positions] = values
    return flat


def picked(p, n):
    return min(n, max(1, int(np.floor(p * n + 0.5))))


def splitmix(seed, i):
    mask = 2**64 - 1
    z = (seed + i * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
    return z ^ z >> 31


def is_format(stage):
    return stage[0][:-2] in ("fp32", "bf16", "fp16", *FORMATS)


def read_values(data, m, stage):
    key, *params = stage
    if key == "fp32@1":
        return np.frombuffer(data[: 4 * m], "<f4"), data[4 * m :]
    if key == "bf16@1":
        return (np.frombuffer(data[: 2 * m], "<u2").astype("<u4") << 16).view("<f4"), data[2 * m :]
    exponent = struct.unpack_from("<h", data)[0]
    if key == "fp16@1":
        halves = np.frombuffer(data[2 : 2 + 2 * m], "<f2").astype(np.float64)
        return (halves * 2.0**exponent).astype(np.float32), data[2 + 2 * m :]
    width, divisor, levels = FORMATS[key[:-2]]
    block = int(params[0])
    blocks = -(-m // block)
    wide = "f32" in params
    codes_at = 4 * blocks if wide else 2 + 2 * blocks
    raw = np.frombuffer(data[:codes_at] if wide else data[2:codes_at], "<f4" if wide else "<f2").astype(np.float64)
    steps = ((raw if wide else raw * 2.0**exponent) / divisor).astype(np.float32)
    end = codes_at + -(-m * width // 8)
    bits = np.unpackbits(np.frombuffer(data[codes_at:end], np.uint8), bitorder="little")[: m * width].reshape(m, width)
    codes = (bits.astype(np.int64) << np.arange(width)).sum(1)
    return np.repeat(steps, block)[:m] * np.array(levels, np.float32)[codes], data[end:]


def read_rice(data, k):
    if k == 0:
        return []
    bits = "".join(f"{byte:08b}"[::-1] for byte in data[1:])
    at, position, positions = 0, -1, []
    for _ in range(k):
        one = bits.index("1", at)
        low = int(bits[one + 1 : one + 1 + data[0]][::-1] or "0", 2)
        position += 1 + ((one - at) << data[0] | low)
        positions.append(position)
        at = one + 1 + data[0]
    assert len(bits) - at < 8
    assert "1" not in bits[at:]
    return positions


# ------------------------------------------------------------------------------------------------ the comparison

LAYOUT = Layout(
    (
        TensorSpec("a.lora_A", (8, 37), role="lora_A"),
        TensorSpec("ä.lora_B", (41, 8), "bfloat16", "lora_B"),
        TensorSpec("scalar", ()),
    )
)
PIPELINES = [
    "fp32",
    "bf16",
    "fp16",
    "int8:64",
    "int8:256:sr",
    "int4:16:f32",
    "fp8",
    "nf4",
    "q2:8",
    "sign",
    "delta|topk:0.1|nf4:64|rice|zstd:3",
    "delta|topk:0.6|fp16|rice",
    "topk:0.01|fp32|rice",
    "topk:0.00001|fp32|rice",
    "randk:0.3|bf16",
    "delta|randk:0.05:unbiased|fp32|zstd:1",
    "delta|segment:3|int8",
    "delta|mask:0.25|nf4",
    "delta|segment:4|mask:0.5|topk:0.5|fp8:8|rice|zstd:19",
    "delta|nf4:64;lora_A=delta|topk:0.2|q2|rice;lora_B=delta|int8:8:sr:f32|zstd:3",
]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_reader_written_from_the_document_reads_the_same_values(pipeline: str) -> None:
    rng = np.random.default_rng(5)
    arrays = {spec.name: draw(rng, spec) for spec in LAYOUT.tensors}
    reference = {spec.name: draw(rng, spec) for spec in LAYOUT.tensors}
    sink = io.BytesIO()
    info = encode_payload(
        sink, arrays, LAYOUT, kind="update", round_=7, base="base", pipeline=pipeline, seed=-3, site="s", site_index=4,
        reference_id="r6" if "delta" in pipeline else "", reference=reference, want_decoded=True,
    )  # fmt: skip
    header, found = read_payload(sink.getvalue(), json.loads(LAYOUT.to_json()), reference)
    assert header["round"] == 7
    assert header["reference"] == ("r6" if "delta" in pipeline else "")
    assert info.decoded is not None
    for name, values in found.items():
        np.testing.assert_array_equal(values, info.decoded[name])


def draw(rng, spec):
    return (rng.standard_t(3, spec.shape) * 1e-3).astype(np.float32).reshape(spec.shape)
