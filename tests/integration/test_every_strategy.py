"""Every recipe as a researcher runs it: `flwr run`, Ray workers, a quantized model, default codecs, either transport."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contracts.test_recipes import CASES
from tests.flower_process import Flower, flower
from tests.tiny_model import make_tiny_model, write_counting

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    folder = tmp_path_factory.mktemp("every")
    make_tiny_model(folder / "model")
    write_counting(folder / "data.jsonl")
    with flower(folder / "home", FEDLLM_CACHE=str(folder / "cache")) as started:
        yield started


@pytest.mark.parametrize("transport", ["grpc", "flower"])
@pytest.mark.parametrize("case", CASES)
def test_it_runs_to_its_end_and_learns(case: str, transport: str, home: Flower) -> None:
    name = f"{case}-{transport}"
    settings = {
        "name": name,
        "num_rounds": 2,
        "model.source": f"path:{home.folder.parent / 'model'}",
        "data.source": f"file:{home.folder.parent / 'data.jsonl'}",
        "data.max_length": 64,
        "adapter.rank": 4,
        "simulation.partitioner": "iid",
        "transport.kind": transport,
        "train.local_steps": 4,
        "train.learning_rate": 0.02,
        "train.schedule": "constant",
        "train.num_threads": 1,
        "evaluation.local_only": False,
        "evaluation.prompt": "",
        **CASES[case],
    }
    output = home.run(settings, num_sites=2, timeout_s=550)
    events = home.events(name)
    assert events, output
    assert events[-1]["status"] == "finished", output
    rounds = [event for event in events if event["event"] == "round"]
    assert len(rounds) == 2
    assert not any(event["rejected"] for event in rounds), output
    losses = [event["loss"] for event in events if event["event"] == "evaluation"]
    assert losses[-1] < losses[0], output
