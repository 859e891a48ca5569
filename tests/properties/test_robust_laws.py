"""Laws that every robust rule obeys, whatever the updates."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedllm.codecs.payload import encode_payload, open_payload
from fedllm.config import read_run_config
from fedllm.update import Arrays, Contribution, Layout, TensorSpec
from strategies.robust.build import build_aggregator
from strategies.robust.judged import Scaled
from strategies.slots import Accumulator, ArraySource
from tests.robust_tools import LAYOUT, RULES, SITE_RULES, aggregate, draw_rows, draw_state, origin, to_arrays, to_row

COMPARISONS = [(rule, "factors") for rule in RULES] + [(rule, "products") for rule in SITE_RULES]
every_rule = pytest.mark.parametrize(("rule", "robust_on"), COMPARISONS)


@every_rule
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 8), st.randoms())
def test_the_order_of_the_sites_does_not_matter(
    rule: str, robust_on: str, seed: int, count: int, random: object
) -> None:
    rows, received = draw_rows(seed, count), draw_state(seed)
    chosen = {**RULES[rule], "strategy.robust_on": robust_on}
    order = list(range(count))
    random.shuffle(order)  # type: ignore[attr-defined]
    sites, weights = [f"site-{number:02}" for number in range(count)], [1.0 + number for number in range(count)]
    first, measured = aggregate(rows, chosen, received=received, weights=weights, sites=sites)
    again, measured_again = aggregate(
        rows[order],
        chosen,
        received=received,
        weights=[weights[number] for number in order],
        sites=[sites[number] for number in order],
    )
    np.testing.assert_allclose(again, first, rtol=1e-5, atol=1e-6)
    assert set(measured_again) == set(measured)


@every_rule
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 7))
def test_identical_updates_and_a_single_one_come_back_to_the_bit(
    rule: str, robust_on: str, seed: int, count: int
) -> None:
    rows = draw_rows(seed, 1).repeat(count, axis=0)
    chosen = {**RULES[rule], "strategy.robust_on": robust_on}
    found, _ = aggregate(rows, chosen, received=draw_state(seed), weights=[1.0 + number for number in range(count)])
    np.testing.assert_array_equal(found, rows[0])


@every_rule
def test_updates_that_change_nothing_aggregate_to_nothing(rule: str, robust_on: str) -> None:
    found, measured = aggregate(np.zeros((5, LAYOUT.num_parameters)), {**RULES[rule], "strategy.robust_on": robust_on})
    assert not found.any()
    assert measured["norm_max"] == 0
    assert all(np.isfinite(value) for value in measured.values())


@pytest.mark.parametrize("robust_on", ["factors", "products"])
@pytest.mark.parametrize("rule", ["krum", "multi-krum", "geometric-median"])
def test_tiny_deltas_on_large_parameters_are_told_apart(rule: str, robust_on: str) -> None:
    """Deltas are 1e-4 of parameters of about 1e3, where distances of parameters in float32 would be all noise."""
    received = {name: np.float32(1e3) * value for name, value in draw_state(1).items()}
    rows = 1e-4 * draw_rows(1, 7)
    rows[6] *= -1
    chosen = {**RULES[rule], "strategy.byzantine_sites": 1, "strategy.robust_on": robust_on}
    _, measured = aggregate(rows, chosen, received=received)
    _, unscaled = aggregate(rows * 1e4, chosen, received={n: v * np.float32(1e-4) for n, v in received.items()})
    shares = [measured[f"share/site-{number:02}"] for number in range(7)]
    assert shares[6] == min(shares)
    assert shares[6] < 0.5 * max(shares)
    if robust_on == "factors":
        assert shares == pytest.approx([unscaled[f"share/site-{number:02}"] for number in range(7)], rel=1e-4)


@dataclass
class Ledger:
    """Which tensor of which update was read, in order."""

    reads: list[tuple[int, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Watched:
    """An update that notes its readings and makes its tensors when they are read, so none exist before."""

    number: int
    ledger: Ledger
    make: Callable[[int, str], NDArray[np.float32]]
    is_partial = False

    def read(self, name: str) -> NDArray[np.float32]:
        self.ledger.reads.append((self.number, name))
        return self.make(self.number, name)

    def add_to(self, name: str, accumulator: Accumulator, weight: float, weights: Accumulator | None = None) -> None:
        assert weights is None
        accumulator += weight * self.read(name).astype(np.float64)


NUM_TENSORS, NUM_UPDATES = 24, 24
DEEP = Layout(
    tuple(
        TensorSpec(
            f"layers.{index // 2}.lora_{'AB'[index % 2]}",
            (8, 800)[:: 1 - 2 * (index % 2)],
            role=f"lora_{'AB'[index % 2]}",
        )
        for index in range(NUM_TENSORS)
    )
)


@every_rule
def test_memory_holds_one_tensor_of_every_update_and_never_a_whole_one(rule: str, robust_on: str) -> None:
    def make(number: int, name: str) -> NDArray[np.float32]:
        values = np.arange(DEEP[name].size, dtype=np.float32) % 17 + number
        return values.reshape(DEEP[name].shape)

    chosen = {**RULES[rule], "strategy.robust_on": robust_on}
    ledger = Ledger()
    received = {name: make(99, name) for name in DEEP.names}
    aggregation = build_aggregator(read_run_config(chosen)).start(DEEP, origin(DEEP, received))
    assert aggregation.reads_until_finish
    tracemalloc.start()
    for number in range(NUM_UPDATES):
        aggregation.fold(Watched(number, ledger, make), Contribution(f"site-{number:02}", 1.0, {}))
    assert not ledger.reads, "folding reads nothing yet"
    aggregation.finish()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    stack = NUM_UPDATES * max(spec.size for spec in DEEP.tensors) * 8  # one tensor of every update in float64
    aggregate_bytes = DEEP.num_parameters * (8 + 8 + 4)  # its sums, its means, and the means in float32
    assert peak < aggregate_bytes + 4 * stack, "it holds more than a layer of every update"
    assert aggregate_bytes + 4 * stack < 0.6 * NUM_UPDATES * DEEP.num_bytes, "the bound tells nothing"
    first_pass = ledger.reads[: NUM_UPDATES * NUM_TENSORS]
    if robust_on == "factors":
        assert first_pass == [(number, name) for name in DEEP.names for number in range(NUM_UPDATES)]


@pytest.fixture
def masked(tmp_path: Path) -> Callable[[int], object]:
    """Return what opens a payload that says nothing about half of the coordinates."""
    reference: Arrays = draw_state(0)

    def open_masked(seed: int) -> object:
        path = tmp_path / f"{seed}.payload"
        encode_payload(
            path,
            to_arrays(draw_rows(seed, 1)[0], LAYOUT),
            LAYOUT,
            kind="update",
            round_=1,
            base="b" * 64,
            pipeline="mask:0.5|fp32",
            reference_id="r",
            reference=reference,
            is_difference=True,
        )
        return open_payload(path, layout=LAYOUT, base="b" * 64, reference=reference)

    return open_masked


@pytest.mark.parametrize("rule", list(RULES))
def test_masked_updates_move_only_what_was_sent(rule: str, masked: Callable[[int], object]) -> None:
    """All sites of a round leave out the same coordinates, so rules compare what all have sent."""
    payloads = [masked(seed) for seed in range(5)]
    aggregation = build_aggregator(read_run_config(RULES[rule])).start(LAYOUT, origin(LAYOUT))
    for number, payload in enumerate(payloads):
        aggregation.fold(payload, Contribution(f"site-{number:02}", 1.0, {}))  # type: ignore[arg-type]
    delta, _ = aggregation.finish()
    dense = np.array([to_row({name: payload.read(name) for name in LAYOUT.names}, LAYOUT) for payload in payloads])  # type: ignore[attr-defined]
    for name in LAYOUT.names:
        sent = payloads[0].coverage(name)  # type: ignore[attr-defined]
        assert not delta[name][~sent].any()
        assert 0 < sent.sum() < sent.size
    np.testing.assert_allclose(to_row(delta, LAYOUT), aggregate(dense, RULES[rule])[0], rtol=1e-5, atol=1e-7)


def test_a_scaled_update_adds_its_share_and_counts_its_whole_weight() -> None:
    arrays = to_arrays(draw_rows(0, 1)[0], LAYOUT)
    scaled = Scaled(ArraySource(arrays), 0.25)
    for name, value in arrays.items():
        np.testing.assert_allclose(scaled.read(name), 0.25 * value, rtol=1e-7)
        sums, weights = np.ones(value.shape), np.ones(value.shape)
        scaled.add_to(name, sums, 2.0, weights)
        np.testing.assert_allclose(sums, 1 + 0.5 * value, rtol=1e-6)
        assert (weights == 3.0).all()
