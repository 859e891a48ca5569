"""Our strategies behind Flower's own loop against our own loop: equal inputs, equal bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage

from fedllm.errors import ConfigError
from fedllm.model.initial import initial_arrays
from fedllm.update import Arrays
from server_app.stock.strategy import stock_strategy
from strategies.registry import RECIPES
from tests.fake_federation import LAYOUT, Handler, InProcessGrid, LocalSite
from tests.unit.test_loop import params, run

NUM_SITES, NUM_ROUNDS = 5, 3
SETTINGS = {"adapter.rank": 2, "num_rounds": NUM_ROUNDS, "rounds.min_sites": NUM_SITES}
CHOICES: dict[str, dict[str, Any]] = {
    "momentum": {"strategy.server_momentum": 0.7, "strategy.server_learning_rate": 0.6},
    "adam": {"strategy.server_optimizer": "adam", "strategy.server_learning_rate": 0.1},
    "yogi": {"strategy.server_optimizer": "yogi", "strategy.server_learning_rate": 0.1},
    "adagrad": {"strategy.server_optimizer": "adagrad", "strategy.server_learning_rate": 0.1},
    "annealed": {"strategy.server_anneal": "cosine", "strategy.server_learning_rate": 0.9},
    "uniform weights": {"strategy.weighting": "uniform"},
    "geometric-median": {"strategy.aggregator": "geometric-median"},
    "multi-krum": {"strategy.aggregator": "multi-krum", "strategy.byzantine_sites": 1},
    "median of rolora": {"strategy.aggregator": "median", "strategy.name": "rolora"},
    "norm bound": {"strategy.norm_bound": "median"},
    "adam on rolora": {
        "strategy.name": "rolora",
        "strategy.server_optimizer": "adam",
        "strategy.server_learning_rate": 0.1,
    },
}
NOT_ON_LORA = ("fedprompt", "fedpeptao")


class StockGrid(InProcessGrid):
    """Flower's blocking call on top of messages that are answered at once."""

    def send_and_receive(self, messages: Iterable[FlowerMessage], *_: Any, **__: Any) -> list[FlowerMessage]:
        return self.pull_messages(self.push_messages(messages))


def members(folder: Path) -> list[LocalSite]:
    return [LocalSite(f"site-{i}", i, folder / f"site-{i}", 10 * (i + 1)) for i in range(NUM_SITES)]


def stock_site(site: LocalSite) -> Handler:
    """Return a ClientApp of somebody else's with a site's objective: it knows arrays, config and metrics."""

    def answer(message: FlowerMessage) -> FlowerMessage:
        received = {name: array.numpy() for name, array in message.content["arrays"].items()}
        metrics = {"num-examples": site.num_examples, "loss": site.score(received).loss}
        records: dict[str, Any] = {"metrics": MetricRecord(metrics)}
        if message.metadata.message_type == "train":
            config = message.content["config"]
            part = LAYOUT.only(config.get("trainable", LAYOUT.names))
            trained = site.descend(received, part, config.get("proximal-mu", 0.0), None)
            records["arrays"] = to_record({name: value.astype(np.float32) for name, value in trained.items()})
        return FlowerMessage(RecordDict(records), reply_to=message)

    return answer


def to_record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in arrays.items()})


def stock_run(folder: Path, settings: Mapping[str, Any]) -> Arrays:
    """Run Flower's own loop and return the arrays that it ends with."""
    grid = StockGrid({100 + index: stock_site(site) for index, site in enumerate(members(folder))})
    first = to_record(initial_arrays(LAYOUT, 42))
    result = stock_strategy({**SETTINGS, **settings}).start(grid, first, num_rounds=NUM_ROUNDS)
    assert len(result.evaluate_metrics_clientapp) == NUM_ROUNDS
    return {name: array.numpy() for name, array in result.arrays.items()}


def own_run(folder: Path, settings: Mapping[str, Any]) -> Arrays:
    grid = InProcessGrid({100 + index: site for index, site in enumerate(members(folder))})
    return params(run(folder, grid, **SETTINGS, **settings))


def refusal(settings: Mapping[str, Any]) -> str:
    """Return why the settings are refused, empty where they are not."""
    try:
        stock_strategy(settings)
    except ConfigError as error:
        return str(error)
    return ""


def assert_equal(folder: Path, settings: Mapping[str, Any]) -> None:
    stock, own = stock_run(folder / "stock", settings), own_run(folder / "own", settings)
    assert stock.keys() == own.keys()
    for name, value in own.items():
        assert not np.array_equal(value, initial_arrays(LAYOUT, 42)[name]) or "lora_A" in name
        np.testing.assert_array_equal(stock[name], value)


@pytest.mark.parametrize("choice", CHOICES)
def test_flowers_loop_and_ours_end_with_the_same_bits(choice: str, tmp_path: Path) -> None:
    assert_equal(tmp_path, CHOICES[choice])


@pytest.mark.parametrize("name", sorted(set(RECIPES) - set(NOT_ON_LORA)))
def test_every_recipe_gives_the_same_bits_or_says_why_it_needs_our_sites(name: str, tmp_path: Path) -> None:
    settings = {"strategy.name": name}
    if reason := refusal(settings):
        assert "cannot run in a stock app: " in reason
    else:
        assert_equal(tmp_path, settings)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"strategy.name": "scaffold"}, "control variates"),
        ({"strategy.name": "fedsa-lora"}, "tensors of their own"),
        ({"strategy.name": "fedper"}, "tensors of their own"),
        ({"strategy.name": "clustered"}, "one for all"),
        ({"strategy.name": "fedex"}, "side factors"),
        ({"strategy.name": "ravan"}, "square matrix between the factors"),
        (
            {"strategy.name": "fedpeptao", "adapter.kind": "prefix", "strategy.server_optimizer": "adam"},
            "chooses which layers",
        ),
    ],
)
def test_what_a_site_must_do_is_the_reason_of_a_refusal(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot run in a stock app: .*{reason}"):
        stock_strategy(settings)


def test_a_soft_prompt_is_averaged_as_any_array() -> None:
    strategy = stock_strategy({"strategy.name": "fedprompt", "adapter.kind": "prompt"})
    prompts = [np.full((3, 4), value, np.float32) for value in (1.0, 4.0)]

    def site(prompt: np.ndarray, weight: int) -> Handler:
        records = {
            "arrays": to_record({"prompt_embeddings": prompt}),
            "metrics": MetricRecord({"num-examples": weight}),
        }
        return lambda message: FlowerMessage(RecordDict(records), reply_to=message)

    grid = StockGrid({1: site(prompts[0], 1), 2: site(prompts[1], 3)})
    result = strategy.start(grid, to_record({"prompt_embeddings": np.zeros((3, 4), np.float32)}), num_rounds=1)
    np.testing.assert_allclose(result.arrays["prompt_embeddings"].numpy(), (1.0 + 3 * 4.0) / 4)
