"""Checkpoints: whole or absent, checked when read, bounded in number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import server_app.checkpoint as module
from fedllm.errors import CheckpointError
from server_app.checkpoint import RunState, load_latest, save_checkpoint
from strategies.slots import OptimizerState
from tests.fake_federation import AGREEMENT
from tests.unit.test_strategies import LAYOUT, random_arrays


def state(round_: int) -> RunState:
    return RunState(
        round=round_,
        params=random_arrays(round_),
        sent=random_arrays(50 + round_),
        optimizer=OptimizerState(
            round_, {"m": random_arrays(100 + round_), "v": random_arrays(200 + round_)}, {"a": round_, "b": 1}
        ),
        layout=LAYOUT,
        target_modules=("q_proj", "v_proj"),
        agreement=AGREEMENT,
        first_id="f" * 64,
        moved=("b",),
    )


def assert_equal(found: RunState | None, expected: RunState) -> None:
    assert found is not None
    assert (found.round, found.layout, found.target_modules, found.agreement) == (
        expected.round,
        expected.layout,
        expected.target_modules,
        expected.agreement,
    )
    assert (found.optimizer.step, found.optimizer.counts) == (expected.optimizer.step, expected.optimizer.counts)
    assert (found.moved, found.first_id) == (expected.moved, expected.first_id)
    pairs = [(found.params, expected.params), (found.sent, expected.sent)]
    pairs += [(found.optimizer.moments[key], expected.optimizer.moments[key]) for key in ("m", "v")]
    for ours, theirs in pairs:
        assert list(ours) == list(theirs)
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_checkpoint_gives_back_every_bit_in_the_layouts_order(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(3), keep=1)
    assert_equal(load_latest(tmp_path), state(3))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for round_ in range(5):
        save_checkpoint(tmp_path, state(round_), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-00003", "round-00004"]
    assert_equal(load_latest(tmp_path), state(4))


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") is None


@pytest.mark.parametrize("damage", ["cut", "flip", "state", "missing"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1), keep=3)
    newest = save_checkpoint(tmp_path, state(2), keep=3)
    file = newest / ("state.json" if damage == "state" else "params.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2])
    assert_equal(load_latest(tmp_path), state(1))


def test_only_damaged_checkpoints_are_an_error_and_not_a_new_start(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, state(1), keep=1)
    (folder / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint of the run can be read"):
        load_latest(tmp_path)


def test_a_crash_while_writing_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, state(1), keep=2)

    def crash(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module, "sync_folder", crash)
    with pytest.raises(CheckpointError, match=r"disk full.*Free space"):
        save_checkpoint(tmp_path, state(2), keep=2)
    assert_equal(load_latest(tmp_path), state(1))
    monkeypatch.undo()
    save_checkpoint(tmp_path, state(2), keep=2)
    assert_equal(load_latest(tmp_path), state(2))
