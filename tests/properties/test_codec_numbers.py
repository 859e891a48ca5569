"""What the codecs achieve: the table of sizes and errors, unbiasedness, exact selection, index bits near the entropy."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedllm.codecs.largest import largest
from fedllm.codecs.payload import open_payload
from fedllm.codecs.pipeline import parse
from fedllm.codecs.rice import Rice, _bitmap, _read, best_rice
from fedllm.codecs.select import num_picked, splitmix64
from fedllm.errors import CorruptPayloadError
from fedllm.update import Layout, TensorSpec
from tests.payload_tools import BASE, encode

SIZE = 460_800
LAYOUT = Layout((TensorSpec("x", (SIZE,)),))
GAUSSIAN = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
STUDENT = np.random.default_rng(1).standard_t(3, SIZE).astype(np.float32)


def read(payload: bytes) -> np.ndarray:
    with open_payload(payload, layout=LAYOUT, base=BASE) as reader:
        return reader.read("x")


def relative_error(pipeline: str, values: np.ndarray) -> tuple[float, float]:
    """Return bits per parameter (payload overhead included) and the error over the norm."""
    payload, _ = encode(pipeline, {"x": values}, LAYOUT, want_decoded=False)
    error = np.linalg.norm((read(payload) - values).astype(np.float64)) / np.linalg.norm(values.astype(np.float64))
    return 8 * len(payload) / SIZE, float(error)


@pytest.mark.parametrize(
    ("pipeline", "bits", "gaussian", "student"),
    [
        ("int8:256", 8.06, 0.0070, 0.017),
        ("fp8:256", 8.06, 0.026, 0.0235),
        ("int4:64", 4.25, 0.108, 0.184),
        ("nf4:64", 4.25, 0.092, 0.124),
        ("q2:64", 2.25, 0.34, 0.55),
        ("sign:256", 1.06, 0.60, 0.76),
        ("topk:0.1|fp16|rice", 2.08, 0.75, 0.55),
        ("topk:0.1|nf4:64|rice", 0.90, 0.75, 0.56),
        ("topk:0.01|fp16|rice", 0.24, 0.96, 0.81),
        ("topk:0.01|nf4:64|rice", 0.12, 0.96, 0.81),
        ("randk:0.1|fp32", 3.2, math.sqrt(0.9), math.sqrt(0.9)),
    ],
)
def test_sizes_and_errors_are_those_of_the_table(pipeline: str, bits: float, gaussian: float, student: float) -> None:
    found_bits, found_gaussian = relative_error(pipeline, GAUSSIAN)
    assert found_bits == pytest.approx(bits, rel=0.01, abs=0.01)
    assert found_gaussian == pytest.approx(gaussian, rel=0.02)
    assert relative_error(pipeline, STUDENT)[1] == pytest.approx(student, rel=0.05)


@pytest.mark.parametrize(("pipeline", "factor"), [("int8:256", 50), ("nf4:64", 50)])
def test_quantizing_the_delta_beats_quantizing_the_weights(pipeline: str, factor: float) -> None:
    weights, delta = GAUSSIAN, 0.01 * GAUSSIAN[::-1]
    trained = (weights + delta).astype(np.float32)
    error_of_weights = np.linalg.norm(roundtrip(pipeline, trained) - trained)
    error_of_delta = np.linalg.norm(roundtrip(pipeline, trained - weights) - (trained - weights))
    assert error_of_weights > factor * error_of_delta


def roundtrip(pipeline: str, values: np.ndarray) -> np.ndarray:
    return read(encode(pipeline, {"x": values}, LAYOUT, want_decoded=False)[0])


@pytest.mark.parametrize("pipeline", ["int8:64:sr", "int4:64:sr", "int4:64:sr:f32"])
def test_stochastic_rounding_is_unbiased(pipeline: str) -> None:
    stage = parse(pipeline).branch("").values
    values = np.random.default_rng(2).standard_normal(640).astype(np.float32)
    num_draws = 4000
    draws = np.stack([stage.decode(stage.encode(values, seed), len(values)) for seed in range(num_draws)])
    bias = draws.mean(0, dtype=np.float64) - values
    deviation = draws.std(0, dtype=np.float64) / math.sqrt(num_draws)
    scores = bias[deviation > 0] / deviation[deviation > 0]
    assert np.abs(scores).max() < 5  # of 640 standard normal scores
    assert abs(scores.mean()) < 5 / math.sqrt(len(scores))
    assert scores.std() == pytest.approx(1, abs=0.15)
    assert np.abs(bias[deviation == 0]).max(initial=0) < 1e-4  # a draw in a thousand would show


def test_stochastic_rounding_of_two_sites_is_independent_and_repeatable() -> None:
    first, again, other = (encode("int4:64:sr", {"x": GAUSSIAN}, LAYOUT, site=site)[0] for site in ("a", "a", "b"))
    assert first == again
    assert first != other
    errors = [read(payload) - GAUSSIAN for payload in (first, other)]
    assert abs(np.corrcoef(errors)[0, 1]) < 0.01


def test_rand_k_is_the_same_for_all_sites_and_another_every_round() -> None:
    picked = [
        read(encode("randk:0.1|fp32", {"x": GAUSSIAN}, LAYOUT, site=s, round_=r)[0]) != 0
        for s, r in (("a", 1), ("b", 1), ("a", 2))
    ]
    np.testing.assert_array_equal(picked[0], picked[1])
    assert (picked[0] & picked[2]).mean() == pytest.approx(0.01, rel=0.1)


def test_unbiased_rand_k_averages_to_the_values() -> None:
    layout = Layout((TensorSpec("x", (50,)),))
    values = np.arange(1, 51, dtype=np.float32)
    total = np.zeros(50)
    for round_ in range(4000):
        payload, _ = encode("randk:0.3:unbiased|fp32", {"x": values}, layout, round_=round_, want_decoded=False)
        with open_payload(payload, layout=layout, base=BASE) as reader:
            reader.add_to("x", total, 1 / 4000)
    np.testing.assert_allclose(total, values, rtol=0.15)


def test_splitmix_gives_its_published_sequence() -> None:
    assert splitmix64(1234567, 3).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@settings(deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.integers(1, 300),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([1.0, -1.0]),
    ),
    st.floats(0.001, 1),
)
def test_top_k_is_exact_and_the_first_of_equals_wins(values: np.ndarray, share: float) -> None:
    count = num_picked(share, len(values))
    oracle = np.sort(np.argsort(-np.abs(values), kind="stable")[:count])
    np.testing.assert_array_equal(largest(values, count), oracle)


@pytest.mark.parametrize("count", [1, 2, 1000, 50_000, 99_999, 100_000])
@pytest.mark.parametrize("decimals", [0, 2, 7])
def test_top_k_of_a_long_array_is_exact_with_and_without_ties(count: int, decimals: int) -> None:
    values = np.random.default_rng(count).standard_normal(100_000).round(decimals).astype(np.float32)
    oracle = np.sort(np.argsort(-np.abs(values), kind="stable")[:count])
    np.testing.assert_array_equal(largest(values, count), oracle)


def test_top_k_of_equal_values_takes_the_first() -> None:
    np.testing.assert_array_equal(largest(np.full(100_000, -2.5, np.float32), 777), np.arange(777))


@pytest.mark.parametrize("density", [0.001, 0.01, 0.05, 0.1, 0.2, 0.25])
def test_coded_gaps_are_within_three_percent_of_the_entropy(density: float) -> None:
    positions = np.flatnonzero(np.random.default_rng(0).random(1_000_000) < density)
    entropy = -(density * math.log2(density) + (1 - density) * math.log2(1 - density)) / density
    coded = Rice().encode(positions, 1_000_000)
    assert 8 * len(coded) / len(positions) < 1.03 * entropy


@pytest.mark.parametrize(("density", "parameter"), [(0.01, 7), (0.1, 3), (0.25, 2), (0.5, 0), (1.0, 0)])
def test_the_parameter_is_the_papers(density: float, parameter: int) -> None:
    assert best_rice(density) == parameter


@pytest.mark.parametrize("density", [0.5, 0.9, 1.0])
def test_dense_positions_cost_at_most_a_bitmap(density: float) -> None:
    dense = np.flatnonzero(np.random.default_rng(0).random(10_000) < density)
    coded = Rice().encode(dense, 10_000)
    bitmap = np.zeros(10_000, np.uint8)
    bitmap[dense] = 1
    assert coded == b"\0" + np.packbits(bitmap[: dense[-1] + 1], bitorder="little").tobytes()


def test_two_far_clusters_cost_at_most_a_bitmap() -> None:
    clusters = np.concatenate([np.arange(500), np.arange(9500, 10_000)])
    coded = Rice().encode(clusters, 10_000)
    assert len(coded) <= Rice().max_bytes(10_000, 1000)
    np.testing.assert_array_equal(Rice().decode(coded, 10_000, 1000), clusters)


@st.composite
def positions_within(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    length = draw(st.integers(1, 5000))
    chosen = draw(st.sets(st.integers(0, length - 1), max_size=60))
    return np.array(sorted(chosen), np.int64), length


@settings(deadline=None)
@given(positions_within())
def test_positions_come_back_within_the_bound(case: tuple[np.ndarray, int]) -> None:
    positions, length = case
    coded = Rice().encode(positions, length)
    assert len(coded) <= Rice().max_bytes(length, len(positions))
    np.testing.assert_array_equal(Rice().decode(coded, length, len(positions)), positions)


@settings(deadline=None)
@given(st.binary(max_size=40), st.integers(1, 300), st.integers(0, 40))
def test_any_bytes_are_valid_positions_or_refused(data: bytes, length: int, count: int) -> None:
    try:
        positions = Rice().decode(data, length, min(count, length))
    except CorruptPayloadError:
        return
    assert len(positions) == min(count, length)
    assert (np.diff(positions, prepend=-1) > 0).all()
    assert (positions < length).all()


@settings(deadline=None)
@given(st.sets(st.integers(0, 99), min_size=1), st.integers(90, 110), st.integers(-1, 1), st.data())
def test_a_bitmap_is_read_as_the_general_code_is(picked: set[int], length: int, more: int, data: st.DataObject) -> None:
    positions = np.array(sorted(picked))
    coded = bytearray(_bitmap(positions) + data.draw(st.sampled_from((b"", b"", b"\0", b"\1"))))
    if data.draw(st.booleans()):
        coded[data.draw(st.integers(0, len(coded) - 1))] = data.draw(st.integers(0, 255))
    found = np.empty(max(1, len(picked) + more), np.int64)
    problem = _read(np.frombuffer(coded, np.uint8), 0, length, found)
    try:
        read = Rice().decode(b"\0" + coded, length, len(found))
    except CorruptPayloadError:
        assert problem
    else:
        assert not problem
        np.testing.assert_array_equal(read, found)


@pytest.mark.parametrize("scale", [2.0**-146, 2.0**-126, 2.0**-66, 2.0**66, 2.0**127])
@pytest.mark.parametrize("pipeline", ["int8", "nf4", "fp8", "fp16", "int4:64:f32", "q2", "sign"])
def test_tiny_and_huge_updates_keep_their_relative_error(pipeline: str, scale: float) -> None:
    values = np.random.default_rng(4).uniform(-1, 1, 4096).astype(np.float32)
    scaled = (values.astype(np.float64) * scale).astype(np.float32)
    stage = parse(pipeline).branch("").values

    def error(array: np.ndarray) -> float:
        data = stage.encode(array, 0)
        stage.check(data, len(array))
        decoded = stage.decode(data, len(array)).astype(np.float64)
        return float(np.linalg.norm(decoded - array) / np.linalg.norm(array.astype(np.float64)))

    granularity = 2.0**-149 / scale  # float32 itself gets coarse among the subnormals
    assert error(scaled) <= 1.02 * error(values) + 40 * granularity


@pytest.mark.parametrize("pipeline", ["int8:8", "nf4:8", "fp8:8"])
def test_a_tiny_block_beside_a_huge_one_keeps_its_values(pipeline: str) -> None:
    stage = parse(pipeline).branch("").values
    values = np.concatenate([np.full(8, 1e4, np.float32), np.linspace(1e-4, 2e-4, 8, dtype=np.float32)])
    decoded = stage.decode(stage.encode(values, 0), 16)
    np.testing.assert_allclose(decoded[8:], values[8:], rtol=0.2)


def test_two_processes_write_the_same_bytes() -> None:
    code = "import sys; from tests.payload_tools import encode; sys.stdout.write(encode(sys.argv[1])[1].digest)"
    text = "delta|topk:0.2|int8:8:sr|rice|zstd:3"
    run = subprocess.run([sys.executable, "-c", code, text], capture_output=True, text=True, check=True)
    assert run.stdout == encode(text)[1].digest
