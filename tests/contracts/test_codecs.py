"""What every registered codec stage promises, run over the whole registry."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedllm.codecs.grids import GRIDS
from fedllm.codecs.payload import open_payload
from fedllm.codecs.pipeline import parse
from fedllm.codecs.quantize import BlockQuantizer
from fedllm.codecs.registry import STAGES
from fedllm.codecs.stage import Kind
from fedllm.errors import NonFiniteError
from fedllm.update import Layout, TensorSpec
from tests.payload_tools import BASE, draw, encode

EXAMPLES: dict[tuple[str, int], tuple[str, ...]] = {
    ("fp32", 1): ("fp32@1",),
    ("bf16", 1): ("bf16@1",),
    ("fp16", 1): ("fp16@1",),
    ("int8", 1): ("int8@1:256", "int8@1:8:sr", "int8@1:64:sr:f32"),
    ("int4", 1): ("int4@1:64", "int4@1:32:sr", "int4@1:16:f32"),
    ("fp8", 1): ("fp8@1:256", "fp8@1:8:f32"),
    ("nf4", 1): ("nf4@1:64", "nf4@1:24:f32"),
    ("q2", 1): ("q2@1:64", "q2@1:8:f32"),
    ("sign", 1): ("sign@1:256", "sign@1:8:f32"),
    ("delta", 1): ("delta@1|fp32@1",),
    ("segment", 1): ("delta@1|segment@1:3|fp32@1",),
    ("mask", 1): ("delta@1|mask@1:0.5|fp32@1",),
    ("topk", 1): ("topk@1:0.1|fp32@1|rice@1", "topk@1:1.0|nf4@1:64|rice@1"),
    ("randk", 1): ("randk@1:0.1|fp32@1", "randk@1:0.7:unbiased|fp32@1"),
    ("rice", 1): ("topk@1:0.3|fp16@1|rice@1",),
    ("zstd", 1): ("fp32@1|zstd@1:3", "int8@1:256|zstd@1:19"),
}
PIPELINES = [text for texts in EXAMPLES.values() for text in texts]
FORMATS = [text for text in PIPELINES if "|" not in text]

finite_arrays = hnp.arrays(
    np.float32,
    st.integers(1, 200),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 1e-45, 3.4e38]),
)
calm_arrays = hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-64, 64, width=32, allow_subnormal=False))


def roundtrip(pipeline: str, values: np.ndarray, **changes: object) -> np.ndarray:
    layout = Layout((TensorSpec("x", values.shape),))
    payload, _ = encode(pipeline, {"x": values}, layout, **changes)
    reference = draw(layout, 99) if "delta" in pipeline else None
    with open_payload(payload, layout=layout, base=BASE, reference=reference) as reader:
        return reader.read("x")


def test_every_stage_has_an_example_here() -> None:
    assert set(EXAMPLES) == set(STAGES)
    for (name, version), texts in EXAMPLES.items():
        for text in texts:
            assert f"{name}@{version}" in text


@pytest.mark.parametrize("text", PIPELINES)
def test_the_header_names_every_stage_with_its_version(text: str) -> None:
    assert encode(text)[1].header.pipeline == text


@pytest.mark.parametrize("text", PIPELINES)
def test_parameters_rebuild_an_equal_stage(text: str) -> None:
    for stage in parse(text).branch("").stages:
        assert STAGES[stage.name, stage.version](list(stage.params)) == stage


@pytest.mark.parametrize("text", PIPELINES)
@settings(max_examples=12, deadline=None)
@given(values=finite_arrays)
def test_any_finite_array_comes_back_finite_in_its_shape(text: str, values: np.ndarray) -> None:
    if "delta" in text or "unbiased" in text:  # these may overflow, which is refused
        values = np.clip(values, -1e30, 1e30)
    decoded = roundtrip(text, values)
    assert decoded.shape == values.shape
    assert decoded.dtype == np.float32
    assert np.isfinite(decoded).all()


@pytest.mark.parametrize("text", PIPELINES)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (7,), (8, 8), (3, 5, 17), (257,)])
def test_every_shape_comes_back(text: str, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32).reshape(shape)
    assert roundtrip(text, np.asarray(values)).shape == shape


@pytest.mark.parametrize("text", PIPELINES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_never_encoded(text: str, bad: float) -> None:
    values = np.ones(100, np.float32)
    values[37] = bad
    with pytest.raises(NonFiniteError):
        roundtrip(text, values)


@pytest.mark.parametrize("text", PIPELINES)
def test_zeros_come_back_as_zeros(text: str) -> None:
    values = draw(Layout((TensorSpec("x", (100,)),)), 99)["x"] if "delta" in text else np.zeros(100, np.float32)
    assert not roundtrip(text, values).any()


@pytest.mark.parametrize("text", PIPELINES)
def test_equal_input_gives_equal_bytes(text: str) -> None:
    assert encode(text)[0] == encode(text)[0]


@pytest.mark.parametrize("text", [text for text in PIPELINES if parse(text).is_lossless])
@settings(max_examples=12, deadline=None)
@given(values=finite_arrays)
def test_a_stage_that_claims_to_be_lossless_keeps_every_bit(text: str, values: np.ndarray) -> None:
    np.testing.assert_array_equal(roundtrip(text, values).view(np.uint32), values.view(np.uint32))


@pytest.mark.parametrize("text", [text for text in PIPELINES if parse(text).is_linear])
@settings(max_examples=20, deadline=None)
@given(values=calm_arrays, seed=st.integers(0, 100))
def test_a_stage_that_claims_to_be_linear_commutes_with_summation(text: str, values: np.ndarray, seed: int) -> None:
    other = np.random.default_rng(seed).standard_normal(values.shape).astype(np.float32)
    difference = {"is_difference": True} if "delta" in text else {}
    sites = [roundtrip(text, part, site=site, **difference) for part, site in ((values, "a"), (other, "b"))]
    together = roundtrip(text, values + other, site="sum", **difference)
    np.testing.assert_allclose(sites[0] + sites[1], together, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("text", [text for text in PIPELINES if not parse(text).is_linear and "unbiased" not in text])
def test_a_stage_that_is_not_linear_says_so(text: str) -> None:
    rng = np.random.default_rng(3)
    values, other = (rng.standard_normal(200).astype(np.float32) for _ in range(2))
    apart = roundtrip(text, values) + roundtrip(text, other)
    assert np.abs(apart - roundtrip(text, values + other)).max() > 1e-5


@pytest.mark.parametrize("text", FORMATS)
@settings(max_examples=20, deadline=None)
@given(values=finite_arrays)
def test_a_number_format_keeps_its_error_bound(text: str, values: np.ndarray) -> None:
    error = np.abs(roundtrip(text, values).astype(np.float64) - values)
    assert (error <= error_bound(text, values)).all()


def error_bound(text: str, values: np.ndarray) -> np.ndarray:
    """Largest error of each value, from the mathematics of the format."""
    magnitude, least = np.abs(values.astype(np.float64)), 2.0**-149
    if text == "fp32@1":
        return np.zeros(len(values))
    if text == "bf16@1":
        return np.maximum(magnitude * 2.0**-8, 2.0**-134)
    if text == "fp16@1":
        return np.maximum(magnitude * 2.0**-11, magnitude.max() * 2.0**-38) + least
    quantizer = parse(text).branch("").values
    assert isinstance(quantizer, BlockQuantizer)
    starts = np.arange(0, len(values), quantizer.block)
    peak = np.repeat(np.maximum.reduceat(magnitude, starts), quantizer.block)[: len(values)]
    if quantizer.grid.scale != "peak":
        return 2 * peak + least
    levels = (
        np.sort(quantizer.grid.table.astype(np.float64)[np.isfinite(quantizer.grid.table)]) / quantizer.grid.divisor
    )
    gap = np.diff(levels).max() * (1.0 if quantizer.stochastic else 0.5)
    scale = (
        peak * (1 + 2.0**-10) + peak.max() * 2.0**-38
    )  # rounded up to binary16, which is coarse when 2^-28 of the peak
    return scale * gap + peak * 2.0**-9 * (peak > 3e38) + 256 * least


@pytest.mark.parametrize("name", [grid.name for grid in GRIDS if grid.scale != "peak"])
@settings(max_examples=20, deadline=None)
@given(values=calm_arrays)
def test_the_coarse_formats_contract(name: str, values: np.ndarray) -> None:
    error = np.linalg.norm(roundtrip(name, values).astype(np.float64) - values)
    assert error <= np.linalg.norm(values.astype(np.float64)) * 1.01 + 1e-30


@pytest.mark.parametrize(
    "text", [text for text in PIPELINES if any(s.kind is Kind.SPARSE for s in parse(text).branch("").stages)]
)
def test_sparse_stages_send_few_coordinates_and_leave_the_others_zero(text: str) -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32) + 10
    share = next(stage for stage in parse(text).branch("").stages if stage.kind is Kind.SPARSE).params[0]
    assert np.count_nonzero(roundtrip(text, values)) <= round(1000 * float(share))
