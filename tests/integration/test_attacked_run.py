"""An attacked federation as a researcher runs it: `flwr run` with simulated attackers, Ray workers, a quantized model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.flower_process import flower
from tests.tiny_model import make_tiny_model, write_counting


def test_a_robust_rule_names_and_withstands_simulated_attackers(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    write_counting(tmp_path / "data.jsonl")
    settings = {
        "name": "attacked",
        "num_rounds": 2,
        "model.source": f"path:{tmp_path / 'model'}",
        "data.source": f"file:{tmp_path / 'data.jsonl'}",
        "data.max_length": 96,
        "simulation.partitioner": "iid",
        "simulation.attack": "sign-flip",
        "simulation.num_attackers": 1,
        "rounds.min_sites": 5,
        "strategy.aggregator": "multi-krum",
        "strategy.byzantine_sites": 1,
        "strategy.norm_bound": "median",
        "train.local_steps": 4,
        "train.learning_rate": 0.01,
        "train.schedule": "constant",
        "train.num_threads": 1,
        "evaluation.local_only": False,
        "evaluation.prompt": "",
    }
    with flower(tmp_path / "home", FEDLLM_CACHE=str(tmp_path / "cache")) as home:
        output = home.run(settings, num_sites=5)
        events = home.events("attacked")
    assert events, output
    assert events[-1]["status"] == "finished", output
    losses = [event["loss"] for event in events if event["event"] == "evaluation"]
    assert losses[-1] < losses[0] - 0.1
    for event in (event for event in events if event["event"] == "round"):
        measured = event["measurements"]
        assert measured["share/site-4"] == 0.0
        assert measured["norm_max"] > 5 * measured["norm_median"] == pytest.approx(5 * measured["norm_bound"])
