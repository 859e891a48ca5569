"""Sites that choose a LoRA rank of their own: where the choice comes from, and what the server does about false ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client_app.workplace import open_workplace
from fedllm.config import read_run_config
from fedllm.messages import Hello, Introduction, TrainInstruction, TrainReport
from fedllm.update import Arrays
from tests.fake_federation import InProcessGrid, QuadraticSite
from tests.unit.test_loop import events, params, run, sites

HELLO = Hello(run="r", run_folder="/somewhere/runs/r", config={})
CHOICE = {"adapter.rank": 2, "adapter.alpha": 4.0, "adapter.min_rank": 1}


class Choosing(QuadraticSite):
    """A site that says which rank it trains, and hands in all components whatever it said."""

    rank = 0
    alpha = 0.0

    def introduce(self) -> Introduction:
        return super().introduce().model_copy(update={"rank": self.rank, "alpha": self.alpha})


def choosing(rank: int, alpha: float = 0.0) -> Choosing:
    site = Choosing("site-9", 9)
    site.rank, site.alpha = rank, alpha
    return site


def test_the_owner_s_file_decides_in_deployment(tmp_path: Path) -> None:
    for text, expected in (("", (0, 0.0)), ("[adapter]\nrank = 4\nalpha = 2.5\n", (4, 2.5))):
        (tmp_path / "site.toml").write_text(f'[site]\nname = "clinic"\n[data]\nsource = "file:own.jsonl"\n{text}')
        workplace = open_workplace({"site-config": str(tmp_path / "site.toml")}, HELLO)
        assert workplace.own_adapter(read_run_config({"simulation.ranks": "8", "simulation.alphas": "9"})) == expected


def test_simulated_sites_take_ranks_and_alphas_in_turn() -> None:
    config = read_run_config({"simulation.ranks": "4, 8", "simulation.alphas": "1,2.5,3"})
    places = [open_workplace({"partition-id": index, "num-partitions": 4}, HELLO) for index in range(4)]
    assert [place.own_adapter(config) for place in places] == [(4, 1.0), (8, 2.5), (4, 3.0), (8, 1.0)]
    assert places[0].own_adapter(read_run_config({})) == (0, 0.0)


@pytest.mark.parametrize(
    ("settings", "rank", "alpha", "words"),
    [
        (CHOICE, 3, 0.0, "out of bounds; expected 1 to 2; found 3"),
        ({**CHOICE, "adapter.min_rank": 2}, 1, 0.0, "out of bounds; expected 2 to 2; found 1"),
        ({**CHOICE, "adapter.min_rank": 0}, 1, 0.0, "no choice of rank and alpha"),
        ({**CHOICE, "adapter.min_rank": 0}, 0, 5.0, "no choice of rank and alpha"),
    ],
)
def test_a_site_that_chose_out_of_bounds_is_left_out(
    settings: dict[str, float], rank: int, alpha: float, words: str, tmp_path: Path
) -> None:
    folder = run(tmp_path, InProcessGrid({**sites(2), 109: choosing(rank, alpha)}), num_rounds=1, **settings)
    [left_out] = events(folder, "left_out")
    assert left_out["site"] == "site-9"
    assert words in left_out["reason"]


def test_an_update_of_another_rank_than_was_said_is_rejected_and_changes_no_bit(tmp_path: Path) -> None:
    folder = run(tmp_path, InProcessGrid({**sites(2), 109: choosing(1)}), num_rounds=1, **CHOICE)
    [event] = events(folder, "round")
    [rejected] = event["rejected"]
    assert rejected["site"] == "site-9"
    assert "layout" in rejected["reason"]
    alone = run(tmp_path / "alone", InProcessGrid(sites(2)), num_rounds=1, **CHOICE)
    for name, value in params(alone).items():
        np.testing.assert_array_equal(params(folder)[name], value)


class Pruning(Choosing):
    """A site that says that it gives up components, and goes on handing in all."""

    next_rank = 1

    def report(self, instruction: TrainInstruction, state: Arrays, **changes: Any) -> TrainReport:
        next_rank = self.next_rank if instruction.round == 1 else 0
        return super().report(instruction, state, **{"next_rank": next_rank, **changes})


@pytest.mark.parametrize(("strategy", "next_rank"), [("fedavg", 1), ("hetlora", 2), ("hetlora", 3)])
def test_components_that_nobody_asked_to_give_up_are_refused(strategy: str, next_rank: int, tmp_path: Path) -> None:
    site = Pruning("site-9", 9)
    site.next_rank = next_rank
    grid = InProcessGrid({**sites(2), 109: site})
    folder = run(tmp_path, grid, num_rounds=1, **{**CHOICE, "strategy.name": strategy})
    [rejected] = events(folder, "round")[0]["rejected"]
    assert rejected["site"] == "site-9"
    assert "gives up other components than its last ones" in rejected["reason"]


def test_what_a_site_gave_up_it_cannot_hand_in_again(tmp_path: Path) -> None:
    grid = InProcessGrid({**sites(2), 109: Pruning("site-9", 9)})
    folder = run(tmp_path, grid, num_rounds=2, **{**CHOICE, "strategy.name": "hetlora"})
    first, second = events(folder, "round")
    assert first["sites"]["site-9"]["next_rank"] == 1
    assert first["rejected"] == []
    [rejected] = second["rejected"]
    assert rejected["site"] == "site-9"
    assert "layout" in rejected["reason"]
