"""FedPepTAO: which layers travel, and what becomes of them at the server."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import tests.fake_federation as fakes
from client_app.choice import most_changed
from fedllm.config import read_run_config
from fedllm.errors import ConfigError, LayoutError
from fedllm.messages import TrainInstruction
from fedllm.model.initial import initial_arrays
from fedllm.update import Arrays, Contribution, Layout, TensorSpec, digest_arrays
from fedllm.work import ClientWork
from strategies.aggregators import WeightedMean
from strategies.compatibility import check_compatibility
from strategies.parts import SomeTensors
from strategies.slots import ArraySource, Origin
from tests.fake_federation import InProcessGrid, LocalSite
from tests.unit.test_loop import events, params, run

PREFIX = Layout(tuple(TensorSpec(f"prefix.{layer}", (2, 3), role="prefix") for layer in range(5)))
ADAM = {"strategy.server_optimizer": "adam", "strategy.server_learning_rate": 0.05}
SETTINGS = {"strategy.name": "fedpeptao", "adapter.kind": "prefix", "strategy.layer_share": 0.4, **ADAM}
RATE, TAU, BETAS = 0.05, 1e-3, (0.9, 0.99)


def filled(*values: float) -> Arrays:
    return {name: np.full((2, 3), value, np.float32) for name, value in zip(PREFIX.names, values, strict=True)}


def test_the_layers_that_changed_most_for_their_size_are_chosen_in_order() -> None:
    received = filled(1, 10, 1, 0, 0)
    assert most_changed(filled(0.5, 4, -0.6, 0, 0), received, 2) == ["prefix.0", "prefix.2"]
    assert most_changed(filled(0.5, 4, -0.6, 0, 0.001), received, 2) == ["prefix.2", "prefix.4"], "zeros that moved"
    assert most_changed(filled(0, 0, 0, 0, 0), received, 3) == ["prefix.0", "prefix.1", "prefix.2"]


@pytest.mark.parametrize(("share", "count"), [(0.4, 2), (0.41, 3), (0.01, 1), (0.2, 1), (1.0, 5)])
def test_a_share_is_rounded_up(share: float, count: int) -> None:
    assert ClientWork(share=share).num_chosen(PREFIX) == count


@pytest.mark.parametrize(
    "names", [(), ("prefix.0",), ("prefix.0", "prefix.0"), ("prefix.0", "prefix.9"), PREFIX.names[:3]]
)
def test_a_site_cannot_send_another_number_of_layers_or_others(names: tuple[str, ...]) -> None:
    with pytest.raises(LayoutError):
        ClientWork(share=0.4).chosen(PREFIX, names)
    if names:
        with pytest.raises(LayoutError):
            ClientWork().chosen(PREFIX, names)


def test_each_layer_is_averaged_over_the_sites_that_sent_it() -> None:
    start = initial_arrays(PREFIX, 0)
    aggregation = WeightedMean().start(PREFIX, Origin(1, PREFIX, start, start, 2))
    for site, weight, held, value in (("a", 1.0, (0, 1), 2.0), ("b", 3.0, (1, 2), 6.0)):
        part = PREFIX.only([PREFIX.names[layer] for layer in held])
        arrays = {name: np.full((2, 3), value, np.float32) for name in part.names}
        source = SomeTensors(ArraySource(arrays), part, PREFIX)
        assert not source.read("prefix.4").any()
        aggregation.fold(source, Contribution(site, weight, {}))
    mean, measured = aggregation.finish()
    assert {name: float(value[0, 0]) for name, value in mean.items()} == {"prefix.0": 2, "prefix.1": 5, "prefix.2": 6}
    assert measured["delta_norm"] == pytest.approx(math.sqrt(6 * (4 + 25 + 36)))


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[LocalSite]:
    """Two sites with a prefix of five layers."""
    initial = digest_arrays(initial_arrays(PREFIX, 42), PREFIX)
    monkeypatch.setattr(fakes, "LAYOUT", PREFIX)
    agreement = fakes.AGREEMENT.model_copy(update={"layout": PREFIX.digest, "initial": initial})
    made = [LocalSite(f"site-{index}", index, tmp_path / f"site-{index}", 10 * (index + 1)) for index in range(2)]
    for site in made:
        site.agreement = agreement
    return made


def test_a_run_is_that_of_plain_float64_pseudocode(tmp_path: Path, sites: list[LocalSite]) -> None:
    folder = run(tmp_path, InProcessGrid({1: sites[0], 2: sites[1]}), num_rounds=4, **SETTINGS)
    state = {name: value.astype(np.float64) for name, value in initial_arrays(PREFIX, 42).items()}
    moments = {name: (np.zeros((2, 3)), np.zeros((2, 3)), 0) for name in PREFIX.names}
    moved: list[set[str]] = []
    for _ in range(4):
        sums: dict[str, tuple[float, np.ndarray]] = {}
        for site in sites:
            trained = site.descend(state, PREFIX, 0.0, None)
            delta = {name: trained[name] - state[name] for name in PREFIX.names}
            scores = {name: np.linalg.norm(delta[name]) / np.linalg.norm(state[name]) for name in delta}
            for name in sorted(scores, key=lambda name: -scores[name])[:2]:
                total, value = sums.get(name, (0.0, np.zeros((2, 3))))
                sums[name] = (total + site.num_examples, value + site.num_examples * delta[name])
        moved.append(set(sums))
        for name, (total, value) in sums.items():
            mean, (first, second, count) = value / total, moments[name]
            first, second, count = 0.9 * first + 0.1 * mean, 0.99 * second + 0.01 * mean**2, count + 1
            moments[name] = (first, second, count)
            step = first / (1 - 0.9**count) / (np.sqrt(second / (1 - 0.99**count)) + TAU)
            state[name] = state[name] + RATE * step
    for name, value in params(folder).items():
        np.testing.assert_allclose(value, state[name], rtol=2e-4, atol=2e-6)
    assert any(len(names) < 5 for names in moved), "in some round a layer stayed as it was"
    assert len(set.union(*moved)) == 5, "over the rounds the layers take turns"


def test_less_travels_both_ways(tmp_path: Path, sites: list[LocalSite]) -> None:
    changes = {"num_rounds": 3, "transport.downlink": "delta|fp32"}
    part = run(tmp_path / "part", InProcessGrid({1: sites[0], 2: sites[1]}), **{**SETTINGS, **changes})
    share = {"strategy.layer_share": 1.0}
    whole = run(tmp_path / "whole", InProcessGrid({1: sites[0], 2: sites[1]}), **{**SETTINGS, **changes, **share})
    for kind, key in (("round", "bytes_up"), ("evaluation", "bytes_down")):
        small, large = (sum(event[key] for event in events(folder, kind)) for folder in (part, whole))
        assert 0 < small < large


def test_a_site_that_sends_more_than_its_share_is_rejected(tmp_path: Path, sites: list[LocalSite]) -> None:
    class Greedy(LocalSite):
        def train(self, instruction: TrainInstruction, envelope: fakes.Envelope) -> tuple[object, object]:
            work = instruction.work.model_copy(update={"share": 0.8})
            return super().train(instruction.model_copy(update={"work": work}), envelope)

    greedy = Greedy("site-9", 9, tmp_path / "site-9")
    greedy.agreement = sites[0].agreement
    folder = run(tmp_path, InProcessGrid({1: sites[0], 2: sites[1], 3: greedy}), num_rounds=1, **SETTINGS)
    [rejected] = events(folder, "round")[0]["rejected"]
    assert rejected["site"] == "site-9"
    assert "another share" in rejected["reason"]


def test_it_needs_a_prefix_and_an_adaptive_server() -> None:
    check_compatibility(read_run_config({**SETTINGS}))
    with pytest.raises(ConfigError, match="layers of a prefix"):
        check_compatibility(read_run_config({**SETTINGS, "adapter.kind": "prompt"}))
    with pytest.raises(ConfigError, match="adaptive"):
        check_compatibility(read_run_config({**SETTINGS, "strategy.server_optimizer": "sgd"}))
