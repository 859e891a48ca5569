"""Layouts, and arrays that do not fit them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm import rng
from fedllm.errors import LayoutError, NonFiniteError
from fedllm.update import DTYPES, Layout, TensorSpec, check_arrays, zeros

specs = st.builds(
    TensorSpec,
    st.text(min_size=1, max_size=20),
    st.lists(st.integers(1, 9), max_size=3).map(tuple),
    st.sampled_from(DTYPES),
    st.sampled_from(["lora_A", "lora_B", "other"]),
)
layouts = st.lists(specs, max_size=6, unique_by=lambda spec: spec.name).map(lambda rows: Layout(tuple(rows)))


@given(layouts)
def test_a_layout_survives_json_with_its_digest(layout: Layout) -> None:
    again = Layout.from_json(layout.to_json())
    assert again == layout
    assert again.digest == layout.digest
    assert layout.num_parameters == sum(value.size for value in zeros(layout).values())


@given(st.text())
def test_text_that_is_no_layout_is_a_layout_error(text: str) -> None:
    try:
        Layout.from_json(text)
    except LayoutError:
        return
    assert text.strip().startswith("[")


@pytest.mark.parametrize(
    "text",
    ['[["a",[0],"float32","x"]]', '[["a",[2],"int4","x"]]', '[["a",[true],"float32","x"]]', '[["a",[2]]]', "[{}]", "7"],
)
def test_an_impossible_tensor_is_refused(text: str) -> None:
    with pytest.raises(LayoutError):
        Layout.from_json(text)


def test_a_repeated_name_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"twice.*a"):
        Layout((TensorSpec("a", (1,)), TensorSpec("a", (2,))))


def test_a_layout_too_large_to_hold_is_refused_before_anything_is_allocated() -> None:
    with pytest.raises(LayoutError, match="too large"):
        Layout((TensorSpec("a", (1 << 20, 1 << 20)),))


LAYOUT = Layout((TensorSpec("a", (2, 3)), TensorSpec("b", (4,))))


def test_arrays_that_fit_pass() -> None:
    check_arrays(zeros(LAYOUT), LAYOUT, "test")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"a": np.zeros((3, 2), np.float32)}, LayoutError, r"float32 \(2, 3\).*\(3, 2\)"),
        ({"a": np.zeros((2, 3))}, LayoutError, "float64"),
        ({"b": np.array([0, 1, np.nan, 0], np.float32)}, NonFiniteError, "'b' holds NaN or infinity"),
        ({"b": np.array([0, 1, np.inf, 0], np.float32)}, NonFiniteError, "'b'"),
        ({"c": np.zeros(1, np.float32)}, LayoutError, "unknown \\['c'\\]"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, np.ndarray], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check_arrays({**zeros(LAYOUT), **change}, LAYOUT, "test")


def test_a_missing_array_is_named() -> None:
    with pytest.raises(LayoutError, match=r"missing \['b'\]"):
        check_arrays({"a": zeros(LAYOUT)["a"]}, LAYOUT, "test")


def test_draws_depend_on_every_part_of_their_name_and_on_nothing_else() -> None:
    names = [
        (1, 0, "", ""),
        (2, 0, "", ""),
        (1, 1, "", ""),
        (1, 0, "x", ""),
        (1, 0, "", "x"),
        (1, 10, "", ""),
        (11, 0, "", ""),
    ]
    seeds = [rng.derive(*name) for name in names]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [rng.derive(*name) for name in names]
    assert rng.generator(1, 2, "a", "b").integers(1 << 60) == rng.generator(1, 2, "a", "b").integers(1 << 60)


def test_a_draw_is_the_same_on_every_machine() -> None:
    assert rng.derive(42, 3, "site-1", "batches") == 2902002452483040202
    assert rng.generator(42, 3, "site-1", "batches").standard_normal(2).tolist() == pytest.approx(
        [0.15913891, 0.25449467], abs=1e-8
    )
