"""The deltas that codecs are measured on are what the rounds of a run changed."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.codecs import held_back
from benchmarks.deltas import by_round, differences
from server_app.checkpoint import save_checkpoint
from tests.unit.test_checkpoint import state


def test_deltas_are_the_differences_of_consecutive_checkpoints(tmp_path: Path) -> None:
    states = [replace(state(round_), params=_scaled(state(0).params, round_**2)) for round_ in range(12)]
    for each in states:
        save_checkpoint(tmp_path, each, keep=12)
    rounds = by_round(differences(tmp_path))
    assert len(rounds) == 11
    for number, delta in enumerate(rounds, 1):
        assert list(delta) == sorted(states[0].params)
        for name, values in delta.items():
            np.testing.assert_array_equal(values, states[number].params[name] - states[number - 1].params[name])


def test_deltas_without_rounds_have_none() -> None:
    assert by_round({"model/lora_A": np.zeros(3, np.float32)}) == []
    assert held_back("fp32", {"lora_A": np.ones(3, np.float32)}) is None


def test_feedback_holds_back_what_topk_did_not_send_yet() -> None:
    deltas = {f"round {number}/a": np.array([4, 3, 2, 1], np.float32) for number in (1, 2)}
    # sent: 4 of [4, 3, 2, 1], then 6 of [4, 6, 4, 2]; held back [4, 0, 4, 2] of a sum of [8, 6, 4, 2]
    assert held_back("topk:0.25|fp32|rice", deltas) == np.sqrt(36 / 120)
    assert held_back("fp32", deltas) == 0


def _scaled(params: dict[str, np.ndarray], factor: int) -> dict[str, np.ndarray]:
    return {name: np.asarray(values * np.float32(factor) + 1) for name, values in params.items()}
