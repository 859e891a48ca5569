"""A federation of real sites on a tiny model, in one process: the real ClientApp behind :class:`InProcessGrid`.

Every message passes through Flower's records and the site's own files as in deployment; only Flower's processes are
missing. The model is two layers of random weights, so a round takes well under a second.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from flwr.app import Message as FlowerMessage

from client_app import app as site_app
from fedllm.runs import RunFolder
from tests.fake_federation import Handler, InProcessGrid
from tests.tiny_model import make_tiny_model
from tests.unit.test_loop import run

WORDS = {
    "colours": ["red", "green", "blue", "white", "black", "brown", "pink", "grey"],
    "numbers": ["one", "two", "three", "four", "five", "six", "seven", "eight"],
}

SETTINGS: dict[str, Any] = {
    "rounds.deadline_s": 60.0,
    "model.quantization": "none",
    "adapter.rank": 4,
    "data.max_length": 48,
    "data.max_holdout_examples": 4,
    "simulation.partition_by": "topic",
    "train.local_steps": 2,
    "train.batch_size": 2,
    "train.learning_rate": 0.01,
    "train.num_threads": 1,
    "evaluation.local_only": False,
    "evaluation.prompt": "",
    "num_rounds": 2,
}

_HANDLERS: dict[str, Callable[[FlowerMessage, Context], FlowerMessage]] = {
    "query": site_app.query,
    "train": site_app.train,
    "train.local_only": site_app.train_local_only,
    "train.personalise": site_app.train_personalise,
    "evaluate": site_app.evaluate,
}


def tiny_sites(count: int = 2) -> dict[int, Handler]:
    """Return real sites by node id, named ``site-0`` and so on."""
    return {100 + index: real_site({"partition-id": index, "num-partitions": count}) for index in range(count)}


def real_site(node_config: dict[str, Any]) -> Handler:
    """Return a ClientApp on a node with this config."""

    def answer(message: FlowerMessage) -> FlowerMessage:
        context = Context(1, message.metadata.dst_node_id, node_config, RecordDict(), {})
        return _HANDLERS[message.metadata.message_type](message, context)

    return answer


def run_tiny(home: Path, grid: InProcessGrid | None = None, **changes: Any) -> RunFolder:
    """Run a federation of real sites to its end; a second call in the same home goes on with the same model and data."""
    if not (home / "tiny").exists():
        make_tiny_model(home / "tiny")
        (home / "data.jsonl").write_text("\n".join(_rows()))
    files = {"model.source": "path:tiny", "data.source": "file:data.jsonl"}
    return run(home, grid or InProcessGrid(tiny_sites()), **{**SETTINGS, **files, **changes})


def _rows() -> list[str]:
    return [
        json.dumps({"prompt": f"{topic} {first}", "completion": f"{second} {first} {second}", "topic": topic})
        for topic, words in WORDS.items()
        for first in words
        for second in words[:3]
    ]


@pytest.fixture
def tiny_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a test a home whose quantized bases stay inside it."""
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path
