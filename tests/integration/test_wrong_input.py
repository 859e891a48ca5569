"""What is wrong is said before anything is trained: expected, found, where, what to do. Real processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.flower_process import Flower, flower
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    folder = tmp_path_factory.mktemp("federation")
    make_tiny_model(folder / "model")
    with flower(folder, FEDLLM_CACHE=str(folder / "cache")) as started:
        yield started


def test_a_missing_file_ends_the_run_before_training_with_every_sites_reason(home: Flower) -> None:
    config = {"name": "missing-file", "model.source": "path:model", "data.source": "file:absent.jsonl"}
    output = home.run(config, num_sites=2)
    [end] = [event for event in home.events("missing-file") if event["event"] == "end"]
    assert end["status"] == "failed", output
    for word in ("too few sites joined", "site-0", "site-1", "DataError", "absent.jsonl"):
        assert word in str(end["reason"]), end["reason"]
    assert not [event for event in home.events("missing-file") if event["event"] in ("round", "attempt", "evaluation")]


def test_an_unknown_key_is_refused_before_a_run_is_started(home: Flower) -> None:
    output = home.run({"name": "unknown-key", "train.learning_rat": 0.1}, num_sites=2)
    assert "Successfully started run" not in output, output
    assert not (home.folder / "runs" / "unknown-key").exists()


def test_a_value_that_cannot_be_is_refused_before_a_folder_is_made(home: Flower) -> None:
    output = home.run({"name": "bad-value", "num_rounds": 0}, num_sites=2)
    assert "num_rounds" in output
    assert "greater than or equal to 1" in output
    assert not (home.folder / "runs" / "bad-value").exists()
