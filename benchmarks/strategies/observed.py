"""Real sites that note what their adapters apply, so that an aggregate can be held against what it should be."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import Message
from numpy.typing import NDArray
from peft.tuners.lora import LoraLayer

from client_app.workplace import open_workplace
from fedllm.messages import EvaluateReport, Failure, Instruction, TrainReport
from fedllm.model.build import cached_base
from fedllm.records import from_records
from tests.site_handlers import real_site

Applied = dict[str, NDArray[np.float64]]
"""What an adapter adds to each layer's weight, [O, I] by layer; empty where it adds nothing to weights."""

ALIKE = 1e-5
"""Relative difference up to which two sites apply the same."""


@dataclass
class ObservedSite:
    """One site of several.

    Attributes:
        node_config: As a SuperNode has it.
        trained: What it applied at the end of its last training, with its number of examples and the round.
        evaluated: What it applied in its last evaluation, with the round.
        failures: What it could not do.
    """

    node_config: Mapping[str, object]
    trained: tuple[int, float, Applied] = (0, 0.0, {})
    evaluated: tuple[int, Applied] = (0, {})
    failures: list[Failure] = field(default_factory=list)

    def __call__(self, message: Message) -> Message:
        """Let the site answer, and look at its model."""
        answer = real_site(self.node_config)(message)
        [instruction, _], [reply, _] = (from_records(one.content, "a message") for one in (message, answer))
        assert isinstance(instruction, Instruction)
        if isinstance(reply, Failure):
            self.failures.append(reply)
        elif isinstance(reply, TrainReport):
            self.trained = reply.round, float(reply.num_examples), self._applied(instruction)
        elif isinstance(reply, EvaluateReport):
            self.evaluated = reply.round, self._applied(instruction)
        return answer

    def _applied(self, instruction: Instruction) -> Applied:
        place, spec = open_workplace(self.node_config, instruction), instruction.read_config().model
        model = cached_base(spec, home=place.home, cache_dir=place.cache_dir, device=place.device).attached.model
        assert model is not None, "the site has just used it"
        return {name: _product(module) for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def exactness_error(sites: Sequence[ObservedSite], round_: int) -> float | None:
    """Return how far what the sites apply after a round is from the weighted mean of what they applied at its end.

    It is the norm of the difference over that of the mean, all layers together, in float64. `None` where there is nothing
    to compare: sites apply adapters of their own, or adapters that are no change of weights, or did not all train in the
    last round, as where the server does not wait for all.
    """
    trained = [site.trained for site in sites]
    found = [site.evaluated for site in sites]
    if {one[0] for one in trained} != {round_} or {one[0] for one in found} != {round_}:
        return None
    if not found[0][1] or any(_distance(one[1], found[0][1]) > ALIKE * _norm(found[0][1]) for one in found):
        return None
    whole = sum(weight for _, weight, _ in trained)
    ideal = {
        name: np.asarray(sum(weight / whole * applied[name] for _, weight, applied in trained)) for name in found[0][1]
    }
    return _distance(found[0][1], ideal) / _norm(ideal)


def _product(layer: Any) -> NDArray[np.float64]:
    """Return what a layer's adapters make of the unit matrix, whatever they are made of, transposed to [O, I]."""
    terms = []
    for name in layer.active_adapters:
        down, up = (copy.deepcopy(part[name]).double() for part in (layer.lora_A, layer.lora_B))
        with torch.inference_mode():
            terms.append(layer.scaling[name] * up(down(torch.eye(layer.in_features, dtype=torch.float64))).T)
    return np.asarray(sum(terms))


def _distance(one: Applied, other: Applied) -> float:
    return _norm({name: value - other[name] for name, value in one.items()})


def _norm(applied: Applied) -> float:
    return float(np.sqrt(sum(np.sum(value**2) for value in applied.values())))
