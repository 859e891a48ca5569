"""Soft prompts through the whole federation: the real server loop, the real sites' code, a real tiny 4-bit model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file

from fedllm.manifest import Manifest
from fedllm.model.build import attach_adapter, first_values, layout_of, write_adapter
from fedllm.model.prompts.attach import without_personal
from fedllm.runs import RunFolder
from server_app.checkpoint import RunState, load_latest
from tests.bases import load_tiny, logits_of
from tests.fake_federation import InProcessGrid
from tests.site_handlers import TINY, make_home, simulated_sites
from tests.unit.test_loop import events, run

IDS = [[5, 40, 200, 33, 7, 90, 12]]
RATES = {"prompt": 0.3, "prefix": 0.3, "ptuning": 0.01}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    return make_home(tmp_path)


def federate(home: Path, kind: str, **changes: Any) -> RunFolder:
    settings = {"strategy.name": "fedprompt", "adapter.kind": kind, "adapter.num_virtual_tokens": 4}
    rate = {"train.learning_rate": RATES[kind]}
    return run(home, InProcessGrid(simulated_sites()), **{**TINY, **settings, **rate, "num_rounds": 2, **changes})


def final(folder: RunFolder) -> RunState:
    state = load_latest(folder.checkpoints)
    assert state is not None
    return state


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", sorted(RATES))
def test_a_federated_soft_prompt_learns_and_is_what_peft_loads(home: Path, kind: str) -> None:
    folder = federate(home, kind)
    assert events(folder, "end")[0]["status"] == "finished"
    losses = {event["round"]: event["loss"] for event in events(folder, "evaluation")}
    assert losses[2] < losses[0] - 0.1
    assert events(folder, "local_only")[0]["loss"] < losses[0]
    state = final(folder)
    assert Manifest.read(folder.manifest).num_parameters == state.layout.num_parameters
    fresh = load_tiny(home)
    base = logits_of(fresh.model, IDS)
    trained = attach_adapter(fresh, Manifest.read(folder.manifest).run_config.spec.adapter)
    assert layout_of(trained) == state.layout
    write_adapter(trained, state.layout, state.params)
    expected = logits_of(trained, IDS)
    loaded = PeftModel.from_pretrained(load_tiny(home).model, str(folder.adapter))
    torch.testing.assert_close(logits_of(loaded, IDS), expected, rtol=0, atol=1e-4)
    assert (expected[:, -1] - base[:, -1]).abs().max() > 1e-2
    assert (folder.best / "adapter_model.safetensors").is_file()


def test_before_training_the_base_alone_is_scored(home: Path) -> None:
    """All kinds have the same loss in round 0, though their first values change what the model computes."""
    prompt, prefix = (federate(home, kind, name=kind, num_rounds=1) for kind in ("prompt", "prefix"))
    lora = run(home, InProcessGrid(simulated_sites()), **{**TINY, "name": "lora", "num_rounds": 1})
    first = [events(folder, "evaluation")[0]["loss"] for folder in (prompt, prefix, lora)]
    assert first[0] == first[1] == first[2]


def test_equal_seeds_give_equal_prompts(home: Path) -> None:
    runs = {name: federate(home, "prompt", name=name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))}
    a, b, c = (final(folder).params["prompt_embeddings"] for folder in runs.values())
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_sites_own_tokens_stay_there_and_are_used_beside_the_shared_ones(home: Path, kind: str) -> None:
    folder = federate(home, kind, **{"adapter.num_personal_tokens": 3, "train.local_steps": 4})
    state = final(folder)
    own = [name for name in state.layout.names if name.startswith("personal")]
    shared = [name for name in state.layout.names if name not in own]
    adapter = Manifest.read(folder.manifest).run_config.spec.adapter
    first = first_values(load_tiny(home), adapter, state.layout, 42)
    kept = {site: load_file(newest(folder.path / "sites" / site, "*.kept-*")) for site in ("site-0", "site-1")}
    for name in own:
        np.testing.assert_array_equal(state.params[name], first[name])
        assert not np.array_equal(kept["site-0"][name], kept["site-1"][name])
        assert not np.array_equal(kept["site-0"][name], first[name])
    assert all(not np.array_equal(state.params[name], first[name]) for name in shared)
    assert set(kept["site-0"]) == set(own)
    [personal] = events(folder, "personalised")
    assert personal["loss"] != personal["federated"]
    last = events(folder, "evaluation")[-1]
    assert personal["loss"] == pytest.approx(last["loss"], rel=1e-6), "evaluations are of sites' own prompts"

    global_ = PeftModel.from_pretrained(load_tiny(home).model, str(folder.adapter))
    assert global_.peft_config["default"].num_virtual_tokens == 4
    site = PeftModel.from_pretrained(load_tiny(home).model, str(newest(folder.path / "sites" / "site-0", "adapter")))
    assert site.peft_config["default"].num_virtual_tokens == 7
    trained = attach_adapter(load_tiny(home), adapter)
    write_adapter(trained, state.layout, state.params | kept["site-0"])
    torch.testing.assert_close(logits_of(site, IDS), logits_of(trained, IDS), rtol=0, atol=1e-4)
    with without_personal(trained):
        torch.testing.assert_close(logits_of(global_, IDS), logits_of(trained, IDS), rtol=0, atol=1e-4)


def newest(folder: Path, pattern: str) -> Path:
    return max(folder.rglob(pattern), key=lambda path: path.name)


def test_the_layers_of_a_prefix_that_changed_most_are_sent(home: Path) -> None:
    adam = {"strategy.server_optimizer": "adam", "strategy.server_learning_rate": 0.3}
    folder = federate(home, "prefix", **{"strategy.name": "fedpeptao", "strategy.layer_share": 0.5, **adam})
    losses = {event["round"]: event["loss"] for event in events(folder, "evaluation")}
    assert losses[2] < losses[0]
    moved = final(folder).optimizer.counts
    assert sum(moved.values()) <= 2 * 2, "two rounds, two sites, one layer of two each"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_site_with_a_shorter_prompt_gets_an_adapter_of_its_own_length(home: Path) -> None:
    lengths = {"adapter.min_virtual_tokens": 2, "simulation.prompt_lengths": "2,4", "adapter.num_personal_tokens": 1}
    folder = federate(home, "prompt", num_rounds=1, **lengths)
    for site, length in (("site-0", 3), ("site-1", 5)):
        own = newest(folder.path / "sites" / site, "adapter")
        loaded = PeftModel.from_pretrained(load_tiny(home).model, str(own))
        assert loaded.peft_config["default"].num_virtual_tokens == length
