"""Soft prompts through the whole federation: the real server loop, the real sites' code, a real tiny 4-bit model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from fedllm.manifest import Manifest
from fedllm.model.build import attach_adapter, layout_of, write_adapter
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
