"""Our strategies behind Flower's five methods: what goes out, what is taken back, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedllm.config import read_run_config
from fedllm.errors import ConfigError, LayoutError, QuorumError
from server_app.stock import limits
from server_app.stock.strategy import StockStrategy, stock_strategy
from strategies.robust.build import build_aggregator
from tests.equivalence.test_stock_strategies import StockGrid, to_record
from tests.fake_federation import Handler, flower_error

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
ZEROS = {A: np.zeros((2, 3), np.float32), B: np.zeros((4, 2), np.float32)}
Reply = dict[str, Any]


def good(value: float, weight: float = 1, **metrics: float) -> Reply:
    arrays = {name: np.full_like(zeros, value) for name, zeros in ZEROS.items()}
    return {"arrays": to_record(arrays), "metrics": MetricRecord({"num-examples": weight, **metrics})}


def site(reply: Reply) -> Handler:
    return lambda message: Message(RecordDict(dict(reply)), reply_to=message)


def grid_of(*replies: Reply) -> StockGrid:
    return StockGrid({10 + index: site(reply) for index, reply in enumerate(replies)})


def strategy_of(**settings: Any) -> StockStrategy:
    return stock_strategy({"adapter.rank": 2, **settings})


def one_round(
    strategy: StockStrategy, grid: StockGrid, arrays: dict[str, NDArray[np.float32]] | None = None, round_: int = 1
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    messages = strategy.configure_train(round_, to_record(arrays or ZEROS), ConfigRecord(), grid)
    return strategy.aggregate_train(round_, grid.send_and_receive(messages))


def damaged(name: str, data: bytes) -> Reply:
    reply = good(100.0)
    reply["arrays"][name] = Array(dtype="float32", shape=ZEROS[name].shape, stype="numpy.ndarray", data=data)
    return reply


def a_file_that_announces(shape: tuple[int, ...]) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


BAD: dict[str, Reply] = {
    "not a number": {**good(1.0), "arrays": to_record({**ZEROS, A: np.full((2, 3), np.nan, np.float32)})},
    "another shape": {**good(1.0), "arrays": to_record({**ZEROS, A: np.ones((2, 4), np.float32)})},
    "another type": {**good(1.0), "arrays": ArrayRecord({A: Array(np.ones((2, 3))), B: Array(ZEROS[B])})},
    "an unknown name": {**good(1.0), "arrays": to_record({**ZEROS, "c": ZEROS[A]})},
    "a missing name": {**good(1.0), "arrays": to_record({A: ZEROS[A]})},
    "no arrays": {"metrics": MetricRecord({"num-examples": 1})},
    "two records of arrays": {**good(1.0), "more": to_record(ZEROS)},
    "no metrics": {"arrays": to_record(ZEROS)},
    "no weight": {**good(1.0), "metrics": MetricRecord({"loss": 1.0})},
    "a negative weight": good(1.0, -3),
    "an infinite weight": good(1.0, float("inf")),
    "no array file": damaged(A, b"not an array"),
    "an enormous array": damaged(A, a_file_that_announces((1 << 40, 1 << 20))),
    "a cut array": damaged(A, a_file_that_announces((2, 3))),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_reply_is_named_and_changes_nothing(what: str, caplog: pytest.LogCaptureFixture) -> None:
    arrays, metrics = one_round(strategy_of(), grid_of(good(1.0, 1, loss=2.0), BAD[what], good(4.0, 3, loss=6.0)))
    assert arrays is not None
    assert metrics is not None
    for name in ZEROS:
        np.testing.assert_allclose(arrays[name].numpy(), (1.0 + 3 * 4.0) / 4)
    assert metrics["loss"] == pytest.approx((2.0 + 3 * 6.0) / 4)
    assert "num-examples" not in metrics
    assert "rejected the update of node 11" in caplog.text


def test_an_error_in_place_of_a_reply_is_named_too(caplog: pytest.LogCaptureFixture) -> None:
    grid = grid_of(good(1.0), good(1.0), good(3.0))
    grid.handlers[10] = lambda message: flower_error(message, "out of memory")
    arrays, _ = one_round(strategy_of(), grid)
    assert arrays is not None
    np.testing.assert_allclose(arrays[A].numpy(), 2.0)
    assert "out of memory" in caplog.text


def test_too_few_usable_replies_leave_the_arrays_as_they_are() -> None:
    assert one_round(strategy_of(), grid_of(good(1.0), BAD["not a number"])) == (None, None)


def test_updates_that_a_rule_cannot_aggregate_leave_the_arrays_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    strategy = strategy_of()
    trusting = read_run_config({"strategy.aggregator": "fltrust", "strategy.trusted_site": "nobody"})
    strategy.strategy = dataclasses.replace(strategy.strategy, aggregator=build_aggregator(trusting))
    assert one_round(strategy, grid_of(good(1.0), good(2.0))) == (None, None)
    assert "the arrays stay as they were: the update of the trusted site is missing" in caplog.text


@pytest.mark.parametrize(("round_", "trained", "frozen"), [(1, B, A), (2, A, B)])
def test_a_site_is_told_what_it_trains_and_held_to_it(round_: int, trained: str, frozen: str) -> None:
    start = {name: np.full_like(zeros, 5.0) for name, zeros in ZEROS.items()}
    strategy = strategy_of(**{"strategy.name": "rolora"})
    whole, part = good(7.0), good(9.0)
    whole["arrays"][frozen] = Array(start[frozen])
    del part["arrays"][frozen]
    grid = grid_of(whole, good(100.0), part)  # one leaves it as it is, one changes it, one leaves it out
    [message, *_] = strategy.configure_train(round_, to_record(start), ConfigRecord({"lr": 0.1}), grid)
    assert message.content["config"] == ConfigRecord({"lr": 0.1, "server-round": round_, "trainable": [trained]})
    arrays, _ = one_round(strategy, grid, start, round_)
    assert arrays is not None
    np.testing.assert_allclose(arrays[trained].numpy(), 8.0)
    np.testing.assert_array_equal(arrays[frozen].numpy(), start[frozen])


def test_a_site_is_told_nothing_where_it_trains_all() -> None:
    [message, *_] = strategy_of().configure_train(1, to_record(ZEROS), ConfigRecord(), grid_of(*[good(1.0)] * 2))
    assert message.content["config"] == ConfigRecord({"server-round": 1})


def test_the_first_round_begins_anew() -> None:
    strategy = strategy_of(**{"strategy.server_optimizer": "adam", "strategy.server_learning_rate": 0.1})
    grid = grid_of(good(1.0), good(3.0))
    first, again = (strategy.start(grid, to_record(ZEROS), num_rounds=2).arrays for _ in range(2))
    for name in ZEROS:
        np.testing.assert_array_equal(first[name].numpy(), again[name].numpy())


def test_a_share_of_the_nodes_is_asked_and_all_evaluate() -> None:
    strategy = strategy_of(**{"rounds.fraction": 0.5, "evaluation.every": 2, "num_rounds": 3})
    grid = grid_of(*[good(1.0, 1, loss=float(index)) for index in range(6)])
    asked = [
        sorted(message.metadata.dst_node_id for message in strategy.configure_train(r, to_record(ZEROS), c, grid))
        for r, c in [(1, ConfigRecord()), (2, ConfigRecord())]
    ]
    assert [len(nodes) for nodes in asked] == [3, 3]
    assert asked[0] != asked[1]
    evaluations = {r: strategy.configure_evaluate(r, to_record(ZEROS), ConfigRecord(), grid) for r in (1, 2, 3)}
    assert [len(list(messages)) for messages in evaluations.values()] == [0, 6, 6]
    scores = strategy.aggregate_evaluate(2, grid.send_and_receive(evaluations[2]))
    assert scores is not None
    assert scores["loss"] == pytest.approx(2.5)


def test_scores_are_weighted_by_examples_and_bad_ones_left_out() -> None:
    strategy = strategy_of()
    grid = grid_of(good(0, 1, loss=1.0, seconds=9.0), good(0, 3, loss=5.0), BAD["no weight"])
    messages = strategy.configure_evaluate(1, to_record(ZEROS), ConfigRecord(), grid)
    assert strategy.aggregate_evaluate(1, grid.send_and_receive(messages)) == MetricRecord({"loss": 4.0})
    assert strategy.aggregate_evaluate(1, []) is None


def test_too_few_nodes_end_the_run() -> None:
    with pytest.raises(QuorumError, match="expected 2"):
        one_round(strategy_of(**{"rounds.join_timeout_s": 0.01}), grid_of(good(1.0)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train.local_steps": 3}, r"without effect in a stock app; found train\.local_steps"),
        ({"rounds.over_selection": 2.0, "transport.uplink": "fp32"}, r"rounds\.over_selection, transport\.uplink"),
        ({"rounds.sampler": "weighted"}, "cannot draw by size"),
        ({"strategy.aggregator": "fltrust", "strategy.trusted_site": "a"}, "no names that last"),
        ({"strategy.aggregator": "krum", "strategy.byzantine_sites": 1}, "2f"),
        ({"strategy.nam": "fedavg"}, r"strategy\.name"),
    ],
)
def test_settings_that_mean_nothing_here_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        stock_strategy(settings)


def test_a_setting_without_effect_is_named(caplog: pytest.LogCaptureFixture) -> None:
    stock_strategy({"strategy.proximal_mu": 0.5})
    assert "strategy.proximal_mu has no effect" in caplog.text


def test_arrays_that_do_not_fit_the_settings_are_refused_before_anything_is_sent() -> None:
    grid = grid_of(good(1.0), good(1.0))
    with pytest.raises(ConfigError, match=r"expected adapter\.rank = 8; found \[2\]"):
        one_round(stock_strategy(), grid)
    with pytest.raises(ConfigError, match="nothing to send"):
        one_round(strategy_of(**{"strategy.name": "rolora"}), grid, {"dense": ZEROS[A]})
    with pytest.raises(LayoutError, match="float32"):
        one_round(strategy_of(), grid, {"dense": np.zeros((2, 2))})  # type: ignore[dict-item]
    with pytest.raises(LayoutError, match="no arrays"):
        strategy_of().configure_train(1, ArrayRecord(), ConfigRecord(), grid)


def test_a_strategy_of_products_needs_arrays_named_as_pairs() -> None:
    other = {name.replace(".weight", ".default.weight"): value for name, value in ZEROS.items()}
    replies = [{"arrays": to_record(other), "metrics": MetricRecord({"num-examples": 1})} for _ in range(2)]
    with pytest.raises(LayoutError, match="do not fit each other"):
        one_round(strategy_of(**{"strategy.name": "flexlora"}), grid_of(*replies), other)


def test_arrays_must_stay_the_same_from_round_to_round() -> None:
    strategy, grid = strategy_of(), grid_of(good(1.0), good(1.0))
    one_round(strategy, grid)
    with pytest.raises(ConfigError, match="changed between rounds"):
        one_round(strategy, grid, {A: ZEROS[A]}, 2)


def test_whatever_a_work_asks_beyond_the_listed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that a later release adds is refused until somebody has thought about it."""
    strategy = strategy_of(**{"strategy.name": "fedprox"}).strategy
    limits.check_strategy(strategy)
    monkeypatch.setattr(limits, "_DONE", ())
    with pytest.raises(ConfigError, match="it asks for 'proximal'"):
        limits.check_strategy(strategy)


def test_the_summary_names_what_runs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="flwr"):
        strategy_of(**{"strategy.name": "fedrot"}).summary()
    assert "fedrot" in caplog.text
