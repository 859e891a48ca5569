"""Whatever arrives, the reader answers with the same values or with one of its own errors, in bounded memory."""

import contextlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.codecs.payload import open_payload
from fedllm.errors import AgreementError, LayoutError, NonFiniteError, PayloadError
from tests.fuzz import fuzz_payload
from tests.fuzz.fuzz_payload import PIPELINES, REFERENCE, SAMPLES, blind, one_input, seeds, start_counting
from tests.payload_tools import BASE, LAYOUT, reseal

REFUSALS = (PayloadError, LayoutError, NonFiniteError, AgreementError)


def read_all(payload: bytes) -> dict[str, np.ndarray]:
    with open_payload(payload, layout=LAYOUT, base=BASE, reference=REFERENCE) as reader:
        return {name: reader.read(name) for name in reader.names}


ORIGINALS = [read_all(sample) for sample in SAMPLES]


@st.composite
def damaged_samples(draw: st.DrawFn) -> tuple[int, bytes]:
    index = draw(st.integers(0, len(SAMPLES) - 1))
    damaged = bytearray(SAMPLES[index])
    for _ in range(draw(st.integers(1, 4))):
        if not damaged:
            break
        at = draw(st.integers(0, len(damaged) - 1))
        match draw(st.sampled_from(["set", "insert", "delete", "cut"])):
            case "set":
                damaged[at] = draw(st.integers(0, 255))
            case "insert":
                damaged[at:at] = draw(st.binary(max_size=20))
            case "delete":
                del damaged[at : at + draw(st.integers(1, 20))]
            case "cut":
                del damaged[max(1, at) :]
    return index, bytes(damaged)


@settings(max_examples=300, deadline=None)
@given(damaged_samples())
def test_a_damaged_payload_is_refused_or_means_the_same(case: tuple[int, bytes]) -> None:
    index, damaged = case
    try:
        found = read_all(damaged)
    except REFUSALS:
        return
    for name, values in found.items():
        np.testing.assert_array_equal(values, ORIGINALS[index][name])


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=0, max_size=60))
def test_damage_with_right_checksums_is_read_or_refused(data: bytes) -> None:
    one_input(data)


def test_the_fuzzer_finds_nothing_in_a_thousand_inputs() -> None:
    start_counting()
    try:
        assert blind(1000, seed=2) == 1000
    finally:
        tracemalloc.stop()


def test_every_seed_of_the_fuzzer_is_a_payload_that_reads() -> None:
    for data in seeds():
        sample, way, rest = data[0], data[1], data[2:]
        if way == fuzz_payload.RAW:
            assert fuzz_payload.read_all(rest)
        else:
            segments = fuzz_payload.segments_of(SAMPLES[sample])
            assert segments[rest[0]] == rest[1:]


def test_the_fuzzer_reports_an_input_that_takes_too_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_payload, "one_input", lambda data: bytes(1000 * len(data)))
    tracemalloc.start()
    try:
        with pytest.raises(AssertionError, match="bytes for an input of 1000"):
            fuzz_payload.bounded(bytes(1000))
    finally:
        tracemalloc.stop()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(SAMPLES) - 1), st.integers(0, 2), st.binary(max_size=600))
def test_any_segment_decodes_to_finite_values_or_is_refused(sample: int, index: int, segment: bytes) -> None:
    try:
        found = read_all(reseal(SAMPLES[sample], lambda segments: segments.__setitem__(index, segment)))
    except REFUSALS:
        return
    assert all(np.isfinite(values).all() for values in found.values())


@pytest.mark.parametrize("sample", range(len(SAMPLES)), ids=PIPELINES)
def test_nothing_larger_than_the_layout_is_allocated_for_what_is_refused(sample: int) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(REFUSALS):
        read_all(SAMPLES[sample][:-1])  # warm: compile, import
    damaged = [corrupt(SAMPLES[sample], rng) for _ in range(50)]
    tracemalloc.start()
    try:
        for payload in damaged:
            with contextlib.suppress(*REFUSALS):
                read_all(payload)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 256_000 + 8 * LAYOUT.num_bytes, peak  # a constant for objects, tracebacks and one histogram


def corrupt(payload: bytes, rng: np.random.Generator) -> bytes:
    def change(segments: list[bytes]) -> None:
        index = int(rng.integers(len(segments)))
        segments[index] = rng.bytes(int(rng.integers(len(segments[index]) + 1)))

    return reseal(payload, change)
