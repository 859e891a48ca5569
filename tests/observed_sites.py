"""Real sites that note what their models apply, multiplied out from PEFT's own layers in float64."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import Message as FlowerMessage
from peft.tuners.lora import LoraLayer

from client_app.workplace import open_workplace
from fedllm.messages import EvaluateReport, Failure, Instruction, TrainReport
from fedllm.model.build import cached_base
from fedllm.model.heads import Headed
from fedllm.records import from_records
from tests.dense_oracle import Dense
from tests.site_handlers import real_site

Update = dict[str, Dense]
"""What a model applies beside its base, [O, I] by layer."""


@dataclass
class ObservedSite:
    """One site of several.

    Attributes:
        node_config: As a SuperNode has it.
        rounds: The rounds that are noted, None for all. What a site applies takes eight bytes for every weight of its base
            that is adapted.
        trained: What it applied at the end of a round's training, with its number of examples, by round.
        evaluated: What it applied when it evaluated the state after a round, by round.
        failures: What it could not do.
    """

    node_config: Mapping[str, object]
    rounds: Container[int] | None = None
    trained: dict[int, tuple[float, Update]] = field(default_factory=dict)
    evaluated: dict[int, Update] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def __call__(self, message: FlowerMessage) -> FlowerMessage:
        """Let the site answer, and look at its model."""
        answer = real_site(self.node_config)(message)
        [instruction, _], [reply, _] = (from_records(one.content, "test") for one in (message, answer))
        assert isinstance(instruction, Instruction)
        if isinstance(reply, Failure):
            self.failures.append(reply)
        elif isinstance(reply, TrainReport) and self._is_noted(reply.round):
            self.trained[reply.round] = float(reply.num_examples), self._applied(instruction)
        elif isinstance(reply, EvaluateReport) and self._is_noted(reply.round):
            self.evaluated[reply.round] = self._applied(instruction)
        return answer

    def _is_noted(self, round_: int) -> bool:
        return self.rounds is None or round_ in self.rounds

    def _applied(self, instruction: Instruction) -> Update:
        place, spec = open_workplace(self.node_config, instruction), instruction.read_config().model
        model = cached_base(spec, home=place.home, cache_dir=place.cache_dir, device=place.device).attached.model
        assert model is not None
        return {name: _product(module) for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def observed_sites(count: int = 3, rounds: Container[int] | None = None) -> dict[int, ObservedSite]:
    """Return sites as Flower's simulation has them, by node; `rounds` are those that are noted, None for all."""
    return {
        100 + index: ObservedSite({"partition-id": index, "num-partitions": count}, rounds) for index in range(count)
    }


def _product(layer: Any) -> Dense:
    terms = [
        layer.scaling[name] * _wide(layer.lora_B[name].weight) @ _middle(down) @ _wide(down.weight)
        for name, down in ((name, layer.lora_A[name]) for name in layer.active_adapters)
    ]
    return np.asarray(sum(terms))


def _middle(down: Any) -> Dense:
    """Return what is between the factors, the unit matrix in plain LoRA."""
    if not isinstance(down, Headed):
        return np.eye(len(down.weight))
    gains = torch.ones(len(down.middle)) if down.gains is None else down.gains
    return _wide(torch.block_diag(*(gain * one for gain, one in zip(gains, down.middle, strict=True))))


def _wide(tensor: torch.Tensor) -> Dense:
    return np.asarray(tensor.detach().double().numpy())
