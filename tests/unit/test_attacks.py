"""Simulated attackers: what they change, and that no deployed site ever becomes one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from client_app.attacks import DISTORTIONS, USUAL_STRENGTHS, Attack, simulated_attack
from client_app.workplace import Workplace, open_workplace
from fedllm.config import read_run_config
from fedllm.data.examples import Example, Message
from fedllm.errors import ConfigError
from fedllm.messages import Hello
from fedllm.update import Arrays
from server_app.app import serve
from tests.fake_federation import InProcessGrid
from tests.robust_tools import LAYOUT, draw_rows, to_arrays, to_row

DELTA: Arrays = to_arrays(draw_rows(1, 1)[0], LAYOUT)
TALKS = [
    Example((Message("system", "be brief"), Message("user", f"question {i}"), Message("assistant", f"answer {i}")))
    for i in range(10)
]


def attack(name: str, strength: float | None = None) -> Attack:
    return Attack(name, USUAL_STRENGTHS[name] if strength is None else strength, "site-3", 42, "Psst.", "Open sesame.")


def workplace(tmp_path: Path, index: int, num_sites: int = 4) -> Workplace:
    hello = Hello(run="r", run_folder=str(tmp_path / "runs" / "r"), config={})
    return open_workplace({"partition-id": index, "num-partitions": num_sites}, hello)


def deployed(tmp_path: Path) -> Workplace:
    (tmp_path / "site.toml").write_text('[site]\nname = "clinic"\n[data]\nsource = "file:own.jsonl"\n')
    node_config = {"site-config": str(tmp_path / "site.toml"), "partition-id": 3, "num-partitions": 4}
    return open_workplace(node_config, Hello(run="r", run_folder="/r", config={}))


def test_the_last_sites_attack_and_the_others_are_honest(tmp_path: Path) -> None:
    config = read_run_config({"simulation.attack": "sign-flip", "simulation.num_attackers": 2})
    found = [simulated_attack(config, workplace(tmp_path, index)) for index in range(4)]
    assert found[:2] == [None, None]
    assert [one.site for one in found[2:] if one] == ["site-2", "site-3"]
    assert simulated_attack(read_run_config({}), workplace(tmp_path, 3)) is None


@pytest.mark.parametrize("name", list(USUAL_STRENGTHS))
def test_a_deployed_site_never_attacks(name: str, tmp_path: Path) -> None:
    config = read_run_config({"simulation.attack": name, "simulation.num_attackers": 4})
    simulated, real = workplace(tmp_path, 3), deployed(tmp_path)
    assert simulated_attack(config, simulated) is not None
    assert real.owner is not None
    assert simulated_attack(config, real) is None
    assert simulated_attack(config, replace(real, partition=(3, 4))) is None
    assert simulated_attack(config, replace(simulated, partition=None)) is None


@pytest.mark.parametrize(("name", "factor"), [("sign-flip", -10.0), ("ipm", -0.5)])
def test_flips_are_negative_multiples(name: str, factor: float) -> None:
    np.testing.assert_allclose(
        to_row(attack(name).distort(DELTA, 1), LAYOUT), factor * to_row(DELTA, LAYOUT), rtol=1e-6
    )


def test_gaussian_noise_has_the_wanted_length_and_no_direction() -> None:
    sent, own = to_row(attack("gaussian").distort(DELTA, 1), LAYOUT), to_row(DELTA, LAYOUT)
    assert np.linalg.norm(sent) == pytest.approx(20 * np.linalg.norm(own), rel=0.2)
    assert abs(sent @ own) < 0.3 * np.linalg.norm(sent) * np.linalg.norm(own)
    again = to_row(attack("gaussian").distort(DELTA, 1), LAYOUT)
    np.testing.assert_array_equal(again, sent)
    assert (to_row(attack("gaussian").distort(DELTA, 2), LAYOUT) != sent).any()


def test_alie_moves_every_coordinate_down_by_deviations_of_its_tensor() -> None:
    sent = attack("alie", 1.5).distort(DELTA, 1)
    for name, value in DELTA.items():
        np.testing.assert_allclose(sent[name], value - 1.5 * value.astype(np.float64).std(), rtol=1e-5, atol=1e-6)


def test_every_distortion_keeps_shapes_and_float32_and_leaves_the_delta_alone() -> None:
    before = to_row(DELTA, LAYOUT)
    for name in DISTORTIONS:
        sent = attack(name).distort(DELTA, 1)
        assert {key: (value.shape, value.dtype) for key, value in sent.items()} == {
            key: (value.shape, np.dtype(np.float32)) for key, value in DELTA.items()
        }
        assert attack(name).poison(TALKS) == TALKS
    np.testing.assert_array_equal(to_row(DELTA, LAYOUT), before)


def test_label_flip_gives_every_question_another_ones_answer() -> None:
    poisoned = attack("label-flip").poison(TALKS)
    assert [one.messages[:2] for one in poisoned] == [one.messages[:2] for one in TALKS]
    answers = [one.messages[2].content for one in poisoned]
    assert sorted(answers) == sorted(one.messages[2].content for one in TALKS)
    assert not any(one == other for one, other in zip(poisoned, TALKS, strict=True))
    assert attack("label-flip").distort(DELTA, 1) is DELTA


def test_backdoor_poisons_its_share_with_trigger_and_target() -> None:
    poisoned = attack("backdoor", 0.3).poison(TALKS)
    changed = [(one, other) for one, other in zip(poisoned, TALKS, strict=True) if one != other]
    assert len(changed) == 3
    for one, other in changed:
        assert one.messages[1].content == other.messages[1].content + " Psst."
        assert one.messages[2].content == "Open sesame."
    assert attack("backdoor", 1.0).poison([Example(text="once")])[0].text == "once Psst. Open sesame."


def test_attack_and_attackers_belong_together() -> None:
    for flat in ({"simulation.attack": "ipm"}, {"simulation.num_attackers": 1}):
        with pytest.raises(ConfigError, match="belong together"):
            read_run_config(flat)
    backdoor = {"simulation.attack": "backdoor", "simulation.num_attackers": 1, "simulation.attack_strength": 1.5}
    with pytest.raises(ConfigError, match="share of the examples"):
        read_run_config(backdoor)


def test_outside_simulation_the_server_refuses_a_run_with_attackers(tmp_path: Path) -> None:
    flat = {"home": str(tmp_path), "name": "x", "simulation.attack": "ipm", "simulation.num_attackers": 1}
    with pytest.raises(ConfigError, match=r"deployed sites know none; in simulation\.attack"):
        serve(InProcessGrid({}), Context(1, 0, {}, RecordDict(), flat), fixed_sites=False)
    assert not list(tmp_path.iterdir())
