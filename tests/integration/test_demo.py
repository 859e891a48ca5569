"""The demo as a user runs it: a real 4-bit model, real text, four sites; the federation must be worth it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from fedllm.runs import read_metrics
from tests.flower_process import REPOSITORY, flower

MARGIN = 0.05
"""Nats by which the federation must beat its comparisons, on the held-out text of all sites."""


def demo_settings() -> dict[str, object]:
    """Return what the demo changes of the run config, section keys joined by dots as `flwr run` takes them."""
    sections = tomllib.loads((REPOSITORY / "deploy" / "demo" / "settings.toml").read_text())
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_federation_beats_the_base_and_every_site_for_itself(tmp_path: Path) -> None:
    with flower(tmp_path) as home:
        output = home.run({"name": "demo", **demo_settings()}, num_sites=4, timeout_s=1700)
        folder = home.folder / "runs" / "demo"
        events = read_metrics(folder / "metrics.jsonl")
    assert events[-1]["status"] == "finished", output
    evaluations = [event for event in events if event["event"] == "evaluation"]
    [alone] = [event for event in events if event["event"] == "local_only"]
    base, federated = evaluations[0]["loss"], evaluations[-1]["loss"]
    assert federated < base - MARGIN
    assert federated < alone["loss"] - MARGIN
    for name in ("report.html", "manifest.json", "adapter/adapter_model.safetensors", "best/adapter_config.json"):
        assert (folder / name).is_file(), name
    assert list((folder / "tensorboard").iterdir())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert len(manifest["sites"]) == 4
    assert events[-1]["peak_rss_bytes"] < 1_000_000_000, "the server holds something as large as a base model"
