"""SIGKILL of the server at any point of the loop, then resume: the same adapter bits as undisturbed.

Real processes: a SuperLink, Flower's simulation, Ray workers, a quantized model, text from files. Only the model is tiny.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.flower_process import Flower, flower
from tests.tiny_model import make_tiny_model

NUM_SITES = 2

pytestmark = pytest.mark.timeout(1200)  # six starts of a federation


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    folder = tmp_path_factory.mktemp("federation")
    make_tiny_model(folder / "model")
    write_text(folder / "data.jsonl")
    with flower(folder, FEDLLM_CACHE=str(folder / "cache")) as started:
        yield started


def write_text(path: Path) -> None:
    rows = []
    for topic in ("colours", "numbers", "animals", "places"):
        for index in range(16):
            question, answer = f"say {topic} {index}", f"{topic} number {index * 7 % 16}"
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            rows.append(json.dumps({"messages": messages, "topic": topic}))
    path.write_text("\n".join(rows))


def settings(folder: Path, name: str) -> dict[str, object]:
    return {
        "name": name,
        "num_rounds": 3,
        "model.source": f"path:{folder / 'model'}",
        "data.source": f"file:{folder / 'data.jsonl'}",
        "data.max_length": 96,
        "train.local_steps": 2,
        "train.batch_size": 2,
        "train.num_threads": 1,
        "evaluation.local_only": False,
        "evaluation.prompt": "",
    }


@pytest.fixture(scope="module")
def undisturbed(home: Flower) -> bytes:
    output = home.run(settings(home.folder, "undisturbed"), NUM_SITES)
    return adapter(home, "undisturbed", output)


def adapter(home: Flower, name: str, output: str) -> bytes:
    path = home.folder / "runs" / name / "adapter" / "adapter_model.safetensors"
    assert path.is_file(), output
    return path.read_bytes()


def has_round(home: Flower, name: str, kind: str, round_: int) -> bool:
    return any(event["event"] == kind and event.get("round") == round_ for event in home.events(name))


MOMENTS = {
    "while sites train": ("evaluation", 0, 0.4),
    "after a round is recorded": ("round", 1, 0.0),
    "while sites evaluate": ("round", 2, 0.3),
    "after the last round": ("round", 3, 0.05),
}
"""When the server is killed: this event of a round, and so many seconds later."""


def test_a_server_killed_again_and_again_resumes_to_the_same_bits(home: Flower, undisturbed: bytes) -> None:
    config = settings(home.folder, "killed")
    for moment, (kind, round_, delay_s) in MOMENTS.items():
        process = home.start_until(config, NUM_SITES, partial(has_round, home, "killed", kind, round_))
        time.sleep(delay_s)
        home.kill_server()
        process.kill()
        process.communicate()
        assert "end" not in {event["event"] for event in home.events("killed")}, moment
        config = {**settings(home.folder, ""), "resume": "killed"}
    output = home.run(config, NUM_SITES)
    assert adapter(home, "killed", output) == undisturbed
    assert [event["round"] for event in home.events("killed") if event["event"] == "round"] == [1, 2, 3]
