"""Number formats against other people's: torch for bfloat16 and FP8, bitsandbytes for NF4, NumPy for binary16."""

import numpy as np
import pytest
import torch

from fedllm.codecs.dense import Bf16, Fp16, from_bf16_bits, to_bf16_bits
from fedllm.codecs.grids import FP8, NF4
from fedllm.codecs.pipeline import parse
from fedllm.errors import NonFiniteError

ALL_16_BITS = np.arange(1 << 16, dtype=np.uint16)


def is_finite_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits & 0x7F80) != 0x7F80


def test_every_finite_bfloat16_survives_unchanged() -> None:
    bits = ALL_16_BITS[is_finite_bf16(ALL_16_BITS)]
    values = from_bf16_bits(bits)
    np.testing.assert_array_equal(to_bf16_bits(values), bits)
    encoded = Bf16().encode(values, 0)
    Bf16().check(encoded, len(bits))
    np.testing.assert_array_equal(Bf16().decode(encoded, len(bits)).view(np.uint32), values.view(np.uint32))


def test_every_bfloat16_that_is_not_finite_is_refused() -> None:
    for bits in ALL_16_BITS[~is_finite_bf16(ALL_16_BITS)]:
        with pytest.raises(NonFiniteError):
            Bf16().check(bits.astype("<u2").tobytes(), 1)


def test_bfloat16_means_what_torch_means() -> None:
    bits = ALL_16_BITS[is_finite_bf16(ALL_16_BITS)]
    theirs = torch.from_numpy(bits.astype(np.int32).astype(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(from_bf16_bits(bits), theirs)


def test_rounding_to_bfloat16_is_torchs_at_and_around_every_tie() -> None:
    upper = (
        ALL_16_BITS[is_finite_bf16(ALL_16_BITS) & is_finite_bf16(ALL_16_BITS + np.uint16(1))].astype(np.uint32) << 16
    )
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper | np.uint32(lower)).view(np.float32)
        theirs = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        saturated = (theirs & 0x7FFF) == 0x7F80
        np.testing.assert_array_equal(to_bf16_bits(values)[~saturated], theirs[~saturated])


def test_a_float32_beyond_bfloat16_saturates() -> None:
    largest = np.finfo(np.float32).max
    values = np.array([largest, -largest], np.float32)
    assert to_bf16_bits(values).tolist() == [0x7F7F, 0xFF7F]


@pytest.mark.parametrize("exponent", [0, -30, -150, 40])
def test_every_finite_binary16_decodes_as_numpy_says(exponent: int) -> None:
    halves = ALL_16_BITS.view(np.float16)
    halves = halves[np.isfinite(halves)]
    data = np.array(exponent, "<i2").tobytes() + halves.astype("<f2").tobytes()
    Fp16().check(data, len(halves))
    np.testing.assert_array_equal(Fp16().decode(data, len(halves)), np.ldexp(halves.astype(np.float32), exponent))


def test_rounding_to_binary16_is_numpys() -> None:
    rng = np.random.default_rng(0)
    spread = np.exp(rng.uniform(-25, 0, 50_000)).astype(np.float32) * rng.choice([-1, 1], 50_000).astype(np.float32)
    middles = ((ALL_16_BITS[:0x7000].astype(np.uint32) << 13) + 0x38001000).view(np.float32)
    for values in (spread, middles[np.isfinite(middles) & (middles < 60000)]):
        data = Fp16().encode(values, 0)
        exponent = int.from_bytes(data[:2], "little", signed=True)
        theirs = np.ldexp(values, -exponent).astype(np.float16)
        np.testing.assert_array_equal(np.frombuffer(data, "<f2", offset=2), theirs)


def test_the_fp8_grid_is_torchs_e4m3() -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(FP8.table, theirs)


def test_rounding_to_fp8_is_torchs() -> None:
    rng = np.random.default_rng(0)
    grid = np.sort(FP8.table[np.isfinite(FP8.table)])
    ties = (grid[1:] + grid[:-1]) / 2
    values = np.concatenate([[448.0], grid, ties, np.exp(rng.uniform(-9, 6.1, 5000))]).astype(np.float32)
    values = values[np.abs(values) <= 448]
    stage = parse(f"fp8:{-(-len(values) // 8) * 8}:f32").branch("").values  # one block, step exactly 1
    codes = np.frombuffer(stage.encode(values, 0), np.uint8, offset=4)
    theirs = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(FP8.table[codes], FP8.table[theirs])


def test_nf4_decodes_to_what_bitsandbytes_gives() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    values = np.random.default_rng(0).standard_normal(64 * 300).astype(np.float32)
    packed, state = bnb.quantize_4bit(torch.from_numpy(values), blocksize=64, quant_type="nf4")
    theirs = bnb.dequantize_4bit(packed, state).numpy()
    stage = parse("nf4:64:f32").branch("").values
    ours = stage.decode(stage.encode(values, 0), len(values))
    np.testing.assert_allclose(NF4.table, state.code.numpy(), atol=1e-7)
    same = np.isclose(ours, theirs, atol=1e-6)
    assert same.mean() > 0.9999  # a value at a midpoint may go either way
    assert np.linalg.norm(ours - values) <= np.linalg.norm(theirs - values) * (1 + 1e-4)
