"""Sites of ranks 4, 8, 16 and 32 in one federation of real processes, and the one adapter that comes out of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from fedllm.cli.main import main
from fedllm.manifest import Manifest
from fedllm.model.fitted import fit_adapter
from fedllm.runs import RunFolder
from server_app.checkpoint import load_latest
from tests.bases import dense, load_tiny, logits_of
from tests.flower_process import flower
from tests.tiny_model import make_tiny_model, write_counting

IDS = [[5, 40, 200, 33, 7, 90, 12]]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_sites_of_four_ranks_make_one_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_model(tmp_path / "tiny")
    write_counting(tmp_path / "data.jsonl")
    settings = {
        "name": "mixed",
        "num_rounds": 2,
        "model.source": f"path:{tmp_path / 'tiny'}",
        "adapter.rank": 32,
        "adapter.min_rank": 4,
        "data.source": f"file:{tmp_path / 'data.jsonl'}",
        "data.max_length": 64,
        "simulation.partitioner": "iid",
        "simulation.ranks": "4,8,16,32",
        "simulation.alphas": "32,8,16,64",
        "strategy.name": "fedex",
        "train.local_steps": 4,
        "train.learning_rate": 0.01,
        "train.schedule": "constant",
        "train.num_threads": 1,
        "evaluation.central_source": f"file:{tmp_path / 'data.jsonl'}",
        "evaluation.local_only": False,
        "evaluation.prompt": "",
    }
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    with flower(tmp_path / "home", FEDLLM_CACHE=str(tmp_path / "cache")) as home:
        output = home.run(settings, num_sites=4)
        events = home.events("mixed")
    assert events, output
    assert events[-1]["status"] == "finished", output
    losses = [event["loss"] for event in events if event["event"] == "evaluation"]
    assert losses[-1] < losses[0] - 0.1
    central = [event["central"]["loss"] for event in events if event["event"] == "evaluation"]
    assert central[-1] < central[0] - 0.1
    rounds = [event for event in events if event["event"] == "round"]
    assert all(event["participants"] == [f"site-{index}" for index in range(4)] for event in rounds)
    assert all(event["discarded_energy"] < 1e-12 for event in rounds)
    assert any(event["measurements"]["side_rank"] > 0 for event in rounds), "means of factors alone are not exact"

    folder = RunFolder(tmp_path / "home" / "runs" / "mixed")
    state = load_latest(folder.checkpoints)
    assert state is not None
    fitted = fit_adapter(load_tiny(tmp_path), Manifest.read(folder.manifest).run_config.spec.adapter)
    fitted.write(state.adapter)
    expected = logits_of(fitted.model, IDS)
    exported = PeftModel.from_pretrained(load_tiny(tmp_path).model, str(folder.adapter))
    torch.testing.assert_close(logits_of(exported, IDS), expected, rtol=0, atol=1e-4)
    home_folder = str(tmp_path / "home")
    assert main(["merge", str(tmp_path / "merged"), "--run", "mixed", "--dtype", "float32", "--home", home_folder]) == 0
    torch.testing.assert_close(logits_of(dense(tmp_path / "merged"), IDS), expected, rtol=0, atol=1e-3)
