"""A site's cut of an adapter: whatever its rank and alpha, it applies what the federation applies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm import rng
from fedllm.errors import ConfigError, LayoutError
from fedllm.lora.choice import own_spec
from fedllm.lora.cut import narrow, narrowed, rest_of, rest_ranks
from fedllm.lora.joined import joined
from fedllm.lora.pairs import TRAINED, pairs_of, with_rank
from fedllm.model.spec import LoraSpec
from fedllm.update import Arrays, Layout, TensorSpec, check_arrays
from strategies.slots import ArraySource
from strategies.widened import Widened

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))
SEEDS = st.integers(0, 10_000)


def layout_for(shapes: list[tuple[int, int]], rank: int, side_rank: int) -> Layout:
    tensors = [
        spec
        for index, (num_out, num_in) in enumerate(shapes)
        for spec in (
            TensorSpec(f"m.{index}.lora_A.weight", (1, num_in), role="lora_A"),
            TensorSpec(f"m.{index}.lora_B.weight", (num_out, 1), role="lora_B"),
        )
    ]
    return with_rank(Layout(tuple(tensors)), rank, side_rank)


def values_for(layout: Layout, seed: int) -> Arrays:
    draw = rng.generator(seed, purpose="values")
    return {spec.name: draw.standard_normal(spec.shape, np.float32) for spec in layout.tensors}


def applied(arrays: Arrays, layout: Layout, scale: float) -> dict[str, np.ndarray]:
    wide = {name: value.astype(np.float64) for name, value in arrays.items()}
    return {
        pair.layer: scale * wide[pair.b.name] @ wide[pair.a.name]
        + (wide[pair.side_b] @ wide[pair.side_a] if pair.side_rank else 0)
        for pair in pairs_of(layout)
    }


@given(SEEDS, st.lists(SHAPES, min_size=1, max_size=3), st.integers(1, 6), st.integers(0, 9), st.data())
def test_every_cut_and_its_rest_are_the_whole(
    seed: int, shapes: list[tuple[int, int]], rank: int, side_rank: int, data: st.DataObject
) -> None:
    layout = layout_for(shapes, rank, side_rank)
    arrays = values_for(layout, seed)
    own_rank, scale = data.draw(st.integers(1, rank)), data.draw(st.sampled_from([0.25, 1.0, 3.0]))
    trained = layout.only([spec.name for spec in layout.tensors if spec.role in TRAINED])
    own = narrow(arrays, trained, own_rank)
    check_arrays(own, narrowed(trained, own_rank), "a cut")
    products = applied(own, narrowed(trained, own_rank), scale)
    ranks = rest_ranks(layout, own_rank)
    for pair in pairs_of(layout):
        b, a = rest_of(pair, arrays, own_rank, scale)
        assert b.shape[1] == a.shape[0] == ranks[pair.layer]
        found = products[pair.layer] + b.astype(float) @ a.astype(float)
        np.testing.assert_allclose(found, applied(arrays, layout, scale)[pair.layer], rtol=1e-5, atol=1e-5)


@given(SEEDS, SHAPES, st.integers(1, 6), st.data())
def test_a_widened_update_reads_and_adds_the_site_s_components_and_zero(
    seed: int, shape: tuple[int, int], rank: int, data: st.DataObject
) -> None:
    layout = layout_for([shape], rank, 0)
    own_rank = data.draw(st.integers(1, rank))
    own = values_for(narrowed(layout, own_rank), seed)
    source = Widened(ArraySource(own), layout, own_rank)
    wide = {name: source.read(name) for name in layout.names}
    for name, value in narrow(wide, layout, own_rank).items():
        np.testing.assert_array_equal(value, own[name])
    for spec in layout.tensors:
        assert np.count_nonzero(wide[spec.name]) <= own[spec.name].size
        total, weights = np.ones(spec.shape), np.zeros(spec.shape)
        source.add_to(spec.name, total, 2.5, weights)
        np.testing.assert_allclose(total, 1 + 2.5 * wide[spec.name].astype(np.float64), rtol=1e-6)
        np.testing.assert_array_equal(weights, np.full(spec.shape, 2.5))


def test_a_cut_that_is_the_whole_is_the_same_bits_and_other_tensors_are_left_alone() -> None:
    layout = layout_for([(5, 7), (3, 4)], 4, 2)
    arrays = values_for(layout, 1)
    assert narrowed(layout, 4) == layout
    for name, value in narrow(arrays, layout, 4).items():
        np.testing.assert_array_equal(value, arrays[name])
    for name, value in narrow(arrays, layout, 2).items():
        assert value.size == arrays[name].size / (2 if "lora" in name else 1)


@given(SEEDS, st.lists(SHAPES, min_size=1, max_size=3), st.integers(1, 6), st.integers(1, 9), st.integers(0, 9))
def test_an_adapter_with_side_factors_is_one_adapter_of_scale_1(
    seed: int, shapes: list[tuple[int, int]], rank: int, side_rank: int, used: int
) -> None:
    layout = layout_for(shapes, rank, side_rank)
    arrays = values_for(layout, seed)
    for pair in pairs_of(layout):
        arrays[pair.side_b][:, used:] = 0
    adapter = LoraSpec(rank=rank, alpha=2.0, rslora=True, side_rank=side_rank)
    spec, one, values = joined(adapter, layout, arrays)
    check_arrays(values, one, "the joined adapter")
    largest = max(pair.side_rank for pair in pairs_of(layout))
    assert (spec.scale, spec.rank) == (1.0, rank + min(used, largest))
    assert {pair.rank for pair in pairs_of(one)} == {spec.rank}
    found = applied(values, one, 1.0)
    for layer, expected in applied(arrays, layout, adapter.scale).items():
        np.testing.assert_allclose(found[layer], expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_without_side_factors_is_exported_as_it_is() -> None:
    layout = layout_for([(5, 7)], 4, 0)
    arrays = values_for(layout, 0)
    assert joined(LoraSpec(rank=4), layout, arrays) == (LoraSpec(rank=4), layout, arrays)


@pytest.mark.parametrize("rank", [1, 9])
def test_a_rank_out_of_bounds_is_refused_with_the_bounds(rank: int) -> None:
    with pytest.raises(ConfigError, match=rf"out of bounds; expected 2 to 8; found {rank}"):
        own_spec(LoraSpec(rank=8, min_rank=2), rank, 0.0)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 0.0), (0, 3.0), (16, 0.0)])
def test_without_a_smallest_rank_a_site_has_no_choice(rank: int, alpha: float) -> None:
    with pytest.raises(ConfigError, match="no choice of rank and alpha; expected rank 8, alpha 16"):
        own_spec(LoraSpec(rank=8), rank, alpha)
    assert own_spec(LoraSpec(rank=8), 8, 16.0) == LoraSpec(rank=8)


def test_factors_that_do_not_belong_together_are_refused() -> None:
    whole = layout_for([(5, 7)], 3, 2)
    for wrong in (
        whole.tensors[:1],
        (whole.tensors[0], TensorSpec("m.0.lora_B.weight", (5, 2), role="lora_B")),
        whole.tensors[:3],
        (*whole.tensors[:3], TensorSpec("m.0.side_B.weight", (6, 2), role="side_B")),
    ):
        with pytest.raises(LayoutError, match="do not fit"):
            pairs_of(Layout(wrong))
