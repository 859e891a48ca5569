"""Real sites for the in-process grid: the client's own code on a real, tiny model and real files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Message as FlowerMessage

from client_app.tasks import perform
from client_app.workplace import open_workplace
from fedllm.errors import FedLLMError
from fedllm.messages import Failure, Instruction
from fedllm.records import from_records, to_records
from tests.fake_federation import Handler
from tests.tiny_model import make_tiny_model

TINY = {
    "model.source": "path:tiny",
    "data.source": "file:dialogues.jsonl",
    "data.max_length": 64,
    "simulation.partitioner": "iid",
    "train.local_steps": 2,
    "train.num_threads": 1,
    "rounds.deadline_s": 60.0,
    "rounds.join_timeout_s": 60.0,
    "evaluation.max_new_tokens": 4,
    "transport.kind": "flower",
}
"""A run config for sites that :func:`make_home` has made ready."""


def make_home(folder: Path, num_examples: int = 24) -> Path:
    """Write a tiny model and short dialogues that follow a rule, so that there is something to learn."""
    make_tiny_model(folder / "tiny")
    rows = [{"prompt": f"Say {number}", "completion": "yes, of course " * 2} for number in range(num_examples)]
    (folder / "dialogues.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def real_site(node_config: Mapping[str, object]) -> Handler:
    """Return what answers for a node: the client's own code.

    Args:
        node_config: As a SuperNode has it, for example a partition in simulation or a site's file.
    """

    def answer(message: FlowerMessage) -> FlowerMessage:
        instruction, envelope = from_records(message.content, "test")
        assert isinstance(instruction, Instruction)
        workplace = open_workplace(node_config, instruction)
        try:
            reply, back = perform(instruction, envelope, workplace)
        except FedLLMError as error:
            reply, back = Failure(site=workplace.site, error=type(error).__name__, reason=str(error)), None
        return FlowerMessage(to_records(reply, back), reply_to=message)

    return answer


def simulated_sites(count: int = 2) -> dict[int, Handler]:
    """Return sites as Flower's simulation has them."""
    return {100 + index: real_site({"partition-id": index, "num-partitions": count}) for index in range(count)}
