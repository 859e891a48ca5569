"""HetLoRA's pruning with real sites: who gives up which components, and what the server makes of what is left."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fedllm.codecs.payload import open_payload
from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from fedllm.lora.choice import pruned_spec, rank_without_tail
from fedllm.lora.cut import narrowed
from fedllm.lora.pairs import pairs_of
from fedllm.model.spec import LoraSpec
from fedllm.runs import RunFolder
from fedllm.update import Arrays
from server_app.checkpoint import load_latest
from strategies.hetlora import hetlora
from tests.tiny_federation import run_tiny, tiny_home
from tests.unit.test_loop import events, params

__all__ = ["tiny_home"]

RANK, SITES = 4, ("site-0", "site-1")
SETTINGS: dict[str, Any] = {
    "strategy.name": "hetlora",
    "strategy.tail_penalty": 20.0,
    "adapter.rank": RANK,
    "adapter.min_rank": 2,
    "simulation.ranks": "4,3",
    "train.schedule": "constant",
    "train.warmup_fraction": 0.0,
    "transport.uplink": "fp32",
    "transport.downlink": "fp32",
    "keep_checkpoints": 9,
    "num_rounds": 4,
}


def ranks(folder: RunFolder, site: str) -> list[tuple[int, int]]:
    """Return the rank that a site trained in each round, and the one that it went on with where it gave some up."""
    parts = [event["sites"][site] for event in events(folder, "round")]
    return [(part["rank"] or RANK, part["next_rank"]) for part in parts]


def before(folder: RunFolder, round_: int) -> Arrays:
    return load_file(folder.checkpoints / f"round-{round_ - 1:05d}" / "params.safetensors")


def handed_in(folder: RunFolder, site: str, round_: int, rank: int) -> Arrays:
    """Return a site's update of a round, read from the site's own files."""
    state = load_latest(folder.checkpoints)
    assert state is not None
    path = folder.path / "sites" / site / f"round-{round_:05d}.update"
    with open_payload(path, layout=narrowed(state.layout, rank), base=state.agreement.base, kind="update") as payload:
        return {name: payload.read(name) for name in payload.names}


def tail(folder: RunFolder, factors: Arrays, first: int) -> float:
    """Return the sum over the layers of the norms' product of the components from `first` on, in plain float64."""
    state = load_latest(folder.checkpoints)
    assert state is not None
    rows = [(factors[p.b.name].astype(float), factors[p.a.name].astype(float)) for p in pairs_of(state.layout)]
    return math.fsum(np.sqrt(np.sum(b[:, first:] ** 2)) * np.sqrt(np.sum(a[first:] ** 2)) for b, a in rows)


def own(site_rank: int, arrays: Arrays) -> Arrays:
    return {n: v[:site_rank] if ".lora_A." in n else v[:, :site_rank] for n, v in arrays.items()}


def test_sites_give_up_the_components_that_shrank_and_never_more_than_allowed(tiny_home: Path) -> None:
    """Every decision is made once more from the files: the state before, the update, and the paper's rule."""
    folder = run_tiny(tiny_home, **SETTINGS)
    given_up = 0
    for site, chosen in zip(SITES, (4, 3), strict=True):
        expected = chosen
        for round_, (trained, following) in enumerate(ranks(folder, site), start=1):
            assert trained == expected
            if round_ < 2:  # the first update is forgotten by now; B was zero, so nothing can have shrunk
                assert following == 0
                continue
            received = own(trained, before(folder, round_))
            update = handed_in(folder, site, round_, trained)
            after = {name: received[name] + value for name, value in update.items()}
            first = max(2, math.floor(0.99 * trained))
            shrank = first < trained and tail(folder, after, first) < tail(folder, received, first)
            assert following == (first if shrank else 0)
            expected = following or expected
            given_up += bool(following)
        assert expected >= 2
    assert given_up >= 2
    assert losses(folder)[-1] < losses(folder)[0]


def losses(folder: RunFolder) -> list[float]:
    return [event["loss"] for event in events(folder, "evaluation")]


def test_the_mean_pads_what_is_left_with_zeros_and_weighs_by_norm(tiny_home: Path) -> None:
    """Against plain float64 over the sites' files; sites share one alpha here, so scales differ with the ranks."""
    folder = run_tiny(tiny_home, **SETTINGS)
    state = load_latest(folder.checkpoints)
    assert state is not None
    last = 4
    held: list[dict[str, Any]] = []
    for site in SITES:
        rank = ranks(folder, site)[last - 1][0]
        assert rank < {"site-0": 4, "site-1": 3}[site], "something was given up by then"
        received, update = before(folder, last), handed_in(folder, site, last, rank)
        wide = {name: np.zeros(value.shape) for name, value in received.items()}
        for name, value in own(rank, received).items():
            own(rank, wide)[name][...] = value.astype(float) + update[name]
        held.append(wide)
    pairs = pairs_of(state.layout)
    norms = [math.sqrt(sum(np.sum((one[p.b.name] @ one[p.a.name]) ** 2) for p in pairs)) for one in held]
    for name, value in params(folder).items():
        expected = sum(norm * one[name] for norm, one in zip(norms, held, strict=True)) / sum(norms)
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)
    measured = events(folder, "round")[-1]["measurements"]
    assert [measured[f"share/{site}"] for site in SITES] == pytest.approx([norm / sum(norms) for norm in norms])


def test_what_was_given_up_outlives_a_restart_bit_for_bit(tiny_home: Path) -> None:
    settings = {**SETTINGS, "transport.uplink": "delta|topk:0.5|int8:64|rice"}
    clean = run_tiny(tiny_home, name="clean", **settings)
    cut = run_tiny(tiny_home, name="cut", **settings)
    for name in ("round-00003", "round-00004"):
        shutil.rmtree(cut.checkpoints / name)
    again = run_tiny(tiny_home, name="", resume="cut", **settings)
    for site in SITES:
        assert ranks(again, site) == ranks(clean, site)
    assert any(following for site in SITES for _, following in ranks(clean, site))
    for name, value in params(clean).items():
        np.testing.assert_array_equal(params(again)[name], value)


@pytest.mark.parametrize("changes", [{"adapter.min_rank": 0, "simulation.ranks": ""}, {"strategy.pruning": 1.0}])
def test_without_a_rank_to_go_down_to_nothing_is_pushed_or_given_up(changes: dict[str, Any], tiny_home: Path) -> None:
    found = [
        run_tiny(tiny_home, name=str(penalty), **{**SETTINGS, **changes, "strategy.tail_penalty": penalty})
        for penalty in (0.0, 20.0)
    ]
    assert all(following == 0 for site in SITES for _, following in ranks(found[1], site))
    for name, value in params(found[0]).items():
        np.testing.assert_array_equal(params(found[1])[name], value)


@given(st.integers(1, 256), st.floats(0.01, 1.0), st.integers(0, 256))
def test_the_rank_without_its_tail_is_bounded_on_both_sides(rank: int, share: float, fewest: int) -> None:
    found = rank_without_tail(rank, share, fewest)
    assert min(rank, fewest or rank) <= found <= rank
    if 0 < fewest <= share * rank:
        assert found == pytest.approx(math.floor(share * rank + 1e-6))


@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_left_keeps_the_scale_that_the_site_chose(rslora: bool) -> None:
    adapter = LoraSpec(rank=16, alpha=32.0, min_rank=2, rslora=rslora)
    chosen = pruned_spec(adapter, 8, 20.0, 8)
    assert pruned_spec(adapter, 8, 20.0, 5).scale == pytest.approx(chosen.scale)
    with pytest.raises(ConfigError, match="remaining rank is out of bounds; expected 2 to 8; found 9"):
        pruned_spec(adapter, 8, 20.0, 9)


def test_the_recipe_takes_the_paper_s_numbers_from_the_config() -> None:
    config = RunConfig.model_validate({"adapter": {"min_rank": 2}, "strategy": {"name": "hetlora", "pruning": 0.9}})
    work = hetlora(config).work.at(1)
    assert (work.pruning, work.tail_penalty) == (0.9, 0.01)
