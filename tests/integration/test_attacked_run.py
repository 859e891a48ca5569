"""An attacked federation as a researcher runs it: `flwr run` with simulated attackers, Ray workers, a quantized model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.flower_process import flower
from tests.tiny_model import make_tiny_model


@pytest.mark.slow
def test_a_robust_rule_names_and_withstands_simulated_attackers(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    rows = [{"prompt": f"Count to {i}.", "completion": f"Here are {i} numbers."} for i in range(80)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "num_rounds": 2,
        "model.source": f"path:{tmp_path / 'model'}",
        "data.source": f"file:{tmp_path / 'data.jsonl'}",
        "data.max_length": 96,
        "simulation.partitioner": "iid",
        "simulation.attack": "sign-flip",
        "simulation.num_attackers": 1,
        "rounds.min_sites": 5,
        "train.local_steps": 4,
        "train.learning_rate": 0.01,
        "train.schedule": "constant",
        "train.num_threads": 1,
        "evaluation.local_only": False,
        "evaluation.prompt": "",
    }
    rule = {"strategy.aggregator": "multi-krum", "strategy.byzantine_sites": 1, "strategy.norm_bound": "median"}
    losses = {}
    with flower(tmp_path / "home", FEDLLM_CACHE=str(tmp_path / "cache")) as home:
        for name, choice in (("mean", {}), ("robust", rule)):
            output = home.run({"name": name, **settings, **choice}, num_sites=5)
            events = home.events(name)
            assert events[-1]["status"] == "finished", output
            losses[name] = [event["loss"] for event in events if event["event"] == "evaluation"]
            rounds = [event for event in events if event["event"] == "round"]
    assert losses["robust"][-1] < losses["robust"][0] < losses["mean"][-1]
    for event in rounds:
        assert event["measurements"]["share/site-4"] == 0.0
        assert event["measurements"]["norm_bound"] < event["measurements"]["norm_max"]
