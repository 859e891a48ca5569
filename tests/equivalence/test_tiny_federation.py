"""Strategies with real sites on a tiny real model: what is trained, what travels, what stays bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from fedllm.model.export import load_peft_adapter
from fedllm.model.initial import initial_arrays
from fedllm.runs import RunFolder
from fedllm.update import Arrays
from server_app.checkpoint import load_latest
from tests.tiny_federation import run_tiny, tiny_home
from tests.unit.test_loop import events, params

__all__ = ["tiny_home"]


def first(folder: RunFolder) -> Arrays:
    """Return the adapter that the run started from."""
    state = load_latest(folder.checkpoints)
    assert state is not None
    return initial_arrays(state.layout, 42)


def changed(folder: RunFolder) -> set[str]:
    """Return the roles of which any tensor moved."""
    start, end = first(folder), params(folder)
    return {name.split(".")[-2] for name in start if not np.array_equal(start[name], end[name])}


def losses(folder: RunFolder) -> list[float]:
    return [event["loss"] for event in events(folder, "evaluation")]


def test_the_seed_decides_every_bit(tiny_home: Path) -> None:
    one, again, other = (
        params(run_tiny(tiny_home, name=name, seed=seed)) for name, seed in [("one", 7), ("again", 7), ("other", 8)]
    )
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert not any(np.array_equal(one[name], other[name]) for name in one)


def test_a_central_set_is_evaluated_after_every_round_and_changes_no_bit(tiny_home: Path) -> None:
    plain = run_tiny(tiny_home, name="plain")
    folder = run_tiny(tiny_home, name="central", **{"evaluation.central_source": "file:data.jsonl"})
    assert all(np.array_equal(params(plain)[name], value) for name, value in params(folder).items())
    scores = [event["central"] for event in events(folder, "evaluation")]
    assert [score["num_tokens"] for score in scores] == [scores[0]["num_tokens"]] * 3
    assert scores[2]["loss"] < scores[1]["loss"] < scores[0]["loss"]


def test_ffa_lora_learns_and_leaves_every_bit_of_a(tiny_home: Path) -> None:
    folder = run_tiny(tiny_home, **{"strategy.name": "ffa-lora"})
    assert changed(folder) == {"lora_B"}
    assert losses(folder)[-1] < losses(folder)[0] - 0.05


def test_rolora_trains_one_factor_a_round(tiny_home: Path) -> None:
    start = run_tiny(tiny_home, name="one", num_rounds=1, **{"strategy.name": "rolora"})
    assert changed(start) == {"lora_B"}
    both = run_tiny(tiny_home, name="two", num_rounds=2, **{"strategy.name": "rolora", "train.schedule": "constant"})
    assert changed(both) == {"lora_A", "lora_B"}
    assert losses(both)[2] < losses(both)[1] < losses(both)[0]


def test_half_of_the_bytes_travel(tiny_home: Path) -> None:
    sizes = {}
    for name in ("fedavg", "ffa-lora", "rolora"):
        lossless = {"transport.uplink": "fp32", "transport.downlink": "delta|fp32"}
        folder = run_tiny(tiny_home, name=name, **lossless, **{"strategy.name": name})
        up = [event["bytes_up"] for event in events(folder, "round")]
        down = [event["bytes_down"] for event in events(folder, "evaluation")][1:]
        sizes[name] = sum(up) + sum(down)
    assert 0.4 < sizes["ffa-lora"] / sizes["fedavg"] < 0.6
    assert 0.45 < sizes["rolora"] / sizes["fedavg"] < 0.55


def test_error_feedback_keeps_a_residual_for_each_factor(tiny_home: Path) -> None:
    sparse = {"transport.uplink": "delta|topk:0.1|fp32|rice", "num_rounds": 4}
    folder = run_tiny(tiny_home, **{"strategy.name": "rolora", **sparse})
    kept = sorted(path.name for path in (folder.path / "sites" / "site-0").glob("round-*.residual-*"))
    by_part: dict[str, list[int]] = {}
    for name in kept:
        round_, _, digest = name.partition(".residual-")
        by_part.setdefault(digest, []).append(int(round_.removeprefix("round-")))
    assert sorted(by_part.values()) == [[1, 3], [2, 4]]
    norms = [event["sites"]["site-0"]["residual_norm"] for event in events(folder, "round")]
    assert all(0 < norm < 10 for norm in norms)


def bits(arrays: Arrays) -> bytes:
    return b"".join(arrays[name].tobytes() for name in sorted(arrays))


def test_fedprox_without_mu_is_fedavg_bit_for_bit(tiny_home: Path) -> None:
    plain = params(run_tiny(tiny_home, name="plain"))
    free = run_tiny(tiny_home, name="free", **{"strategy.name": "fedprox", "strategy.proximal_mu": 0.0})
    pulled = run_tiny(tiny_home, name="pulled", **{"strategy.name": "fedprox", "strategy.proximal_mu": 10.0})
    assert bits(params(free)) == bits(plain) != bits(params(pulled))


def test_scaffold_begins_as_fedavg_and_then_corrects(tiny_home: Path) -> None:
    sgd = {"train.optimizer": "sgd", "train.learning_rate": 0.5, "train.schedule": "constant"}
    found = {}
    for name in ("fedavg", "scaffold"):
        for num_rounds in (1, 3):
            run_name = f"{name}-{num_rounds}"
            folder = run_tiny(tiny_home, name=run_name, num_rounds=num_rounds, **sgd, **{"strategy.name": name})
            found[run_name] = params(folder)
    adapter = found["fedavg-1"].keys()
    first, last = ({name: found[run][name] for name in adapter} for run in ("scaffold-1", "scaffold-3"))
    assert bits(first) == bits(found["fedavg-1"])
    assert bits(last) != bits(found["fedavg-3"])
    assert any(value.any() for name, value in found["scaffold-3"].items() if name not in adapter)


def test_fedsa_keeps_b_at_the_sites_and_goes_on_with_it_after_a_restart(tiny_home: Path) -> None:
    settings = {"strategy.name": "fedsa-lora", "keep_checkpoints": 9, "transport.uplink": "delta|topk:0.5|fp32|rice"}
    clean = run_tiny(tiny_home, name="clean", num_rounds=4, **settings)
    assert changed(clean) == {"lora_A"}
    assert losses(clean)[-1] < losses(clean)[0] - 0.05
    cut = run_tiny(tiny_home, name="cut", num_rounds=4, **settings)
    for name in ("round-00003", "round-00004"):
        shutil.rmtree(cut.checkpoints / name)
    again = run_tiny(tiny_home, name="", resume="cut", num_rounds=4, **settings)
    assert bits(params(again)) == bits(params(clean))
    for site in ("site-0", "site-1"):
        [kept] = (clean.path / "sites" / site).glob("round-00004.kept-*")
        assert (again.path / "sites" / site / kept.name).read_bytes() == kept.read_bytes()


def test_fedper_shares_the_lower_layers_and_keeps_the_upper_ones(tiny_home: Path) -> None:
    """The tiny model has two layers: one is shared, one stays."""
    folder = run_tiny(tiny_home, **{"strategy.name": "fedper"})
    start, end = first(folder), params(folder)
    for name in start:
        assert np.array_equal(start[name], end[name]) == (".layers.1." in name)
    [event] = events(folder, "personalised")
    assert event["loss"] == pytest.approx(losses(folder)[-1], abs=1e-6)
    assert event["loss"] < event["federated"] < losses(folder)[0]


@pytest.mark.parametrize("strategy", ["fedavg", "fedsa-lora", "fedper"])
def test_a_site_ends_with_an_adapter_of_its_own_that_peft_reads(strategy: str, tiny_home: Path) -> None:
    folder = run_tiny(tiny_home, **{"strategy.name": strategy, "evaluation.personal_steps": 4})
    [event] = events(folder, "personalised")
    assert event["num_steps"] == 4
    own = [load_peft_adapter(folder.path / "sites" / site / "adapter") for site in ("site-0", "site-1")]
    assert own[0].keys() == own[1].keys() == params(folder).keys()
    assert bits(own[0]) != bits(own[1])
    assert event["loss"] < losses(folder)[-1]
    for site in ("site-0", "site-1"):
        assert event["sites"][site]["loss"] < event["sites"][site]["federated"]
    assert "personalised" in folder.report.read_text()
    assert "personalised" in folder.log.read_text()


def test_personalising_changes_nothing_that_a_resumed_run_goes_on_with(tiny_home: Path) -> None:
    settings = {"strategy.name": "fedsa-lora", "evaluation.personal_steps": 3, "train.schedule": "constant"}
    plain = run_tiny(tiny_home, name="plain", num_rounds=3, **{**settings, "evaluation.personal_steps": 0})
    run_tiny(tiny_home, name="more", num_rounds=2, **settings)
    more = run_tiny(tiny_home, name="", resume="more", num_rounds=3, **settings)
    assert bits(params(plain)) == bits(params(more))
