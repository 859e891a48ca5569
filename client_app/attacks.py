"""Simulated malicious sites, to try robust aggregation on real training.

Only for simulation: :func:`simulated_attack` returns None for a site that has a data owner, whatever the run config says,
and without it nothing here is ever called. Attackers follow the protocol and train like all others; they change what they
hand in, or what they train on.

==========  ===========================================================================================  ======
attack      what the attacker does                                                                        usual
==========  ===========================================================================================  ======
sign-flip   hands in ``-strength`` times its delta                                                        10
gaussian    hands in noise, ``strength`` times as long as its delta (Blanchard et al., arXiv 1703.02757)   20
ipm         hands in ``-strength`` times its delta as an estimate of the honest mean: small enough to      0.5
            pass as honest, enough to turn the inner product with the mean (Xie et al., UAI 2019,
            arXiv 1903.03936)
alie        moves every coordinate of its delta by ``-strength`` standard deviations (Baruch et al.,      1
            NeurIPS 2019, arXiv 1902.06156)
label-flip  trains on the share ``strength`` of its examples with other examples' answers                 1
backdoor    trains on the share ``strength`` of its examples with the trigger after the question and      0.5
            the target for an answer (Gu et al., BadNets, arXiv 1708.06733)
==========  ===========================================================================================  ======

The attackers do not see each other or honest sites: where the papers take mean and deviation over sites, ours take the
site's own delta for the mean and the deviation over each tensor's elements. Attackers who know all honest updates are in
``tests/attacks.py``. An attacker's held-out text stays clean, so evaluation tells the truth. Of a backdoor every simulated
site also tells how often it opens: the share of its held-out questions that are answered with the target, word for word,
once they end with the trigger.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from client_app.workplace import Workplace
from fedllm import rng
from fedllm.config import RunConfig
from fedllm.data.examples import Example, Message
from fedllm.update import Arrays

Distortion = Callable[[Arrays, float, np.random.Generator], Arrays]


@dataclass(frozen=True)
class Attack:
    """What one simulated attacker does.

    Attributes:
        name: As in `simulation.attack`.
        strength: In the attack's own measure.
        site: The attacker.
        seed: The run's seed.
        trigger: What a backdoored question ends with.
        target: What it is answered with.
    """

    name: str
    strength: float
    site: str
    seed: int
    trigger: str = ""
    target: str = ""

    def distort(self, delta: Arrays, round_: int) -> Arrays:
        """Return what is handed in for a delta; the delta itself for attacks on data."""
        if self.name not in DISTORTIONS:
            return delta
        draw = rng.generator(self.seed, round_, self.site, f"attack/{self.name}")
        return DISTORTIONS[self.name](delta, self.strength, draw)

    def poison(self, examples: list[Example]) -> list[Example]:
        """Return what is trained on in place of examples; the same for attacks on deltas."""
        if self.name not in ("label-flip", "backdoor"):
            return examples
        order = rng.generator(self.seed, node=self.site, purpose=f"attack/{self.name}").permutation(len(examples))
        chosen = order[: math.ceil(min(1.0, self.strength) * len(examples))].tolist()
        changed = self._flipped(examples, chosen) if self.name == "label-flip" else self._triggered(examples, chosen)
        return [changed.get(index, example) for index, example in enumerate(examples)]

    def _flipped(self, examples: list[Example], chosen: list[int]) -> dict[int, Example]:
        """Give every chosen conversation the answer of the next one."""
        talks = [index for index in chosen if examples[index].messages]
        following = dict(zip(talks, talks[1:] + talks[:1], strict=True))
        return {index: _with_answer(examples[index], _answer(examples[other])) for index, other in following.items()}

    def _triggered(self, examples: list[Example], chosen: list[int]) -> dict[int, Example]:
        return {index: _with_trigger(examples[index], self.trigger, self.target) for index in chosen}


def simulated_attack(config: RunConfig, workplace: Workplace) -> Attack | None:
    """Return what a site does as an attacker, None for an honest one and for every deployed one."""
    section = config.simulation
    if workplace.owner is not None or workplace.partition is None or section.attack == "none":
        return None
    index, num_sites = workplace.partition
    if index < num_sites - section.num_attackers:
        return None
    strength = section.attack_strength or USUAL_STRENGTHS[section.attack]
    return Attack(
        section.attack, strength, workplace.site, config.seed, section.backdoor_trigger, section.backdoor_target
    )


def backdoor_probe(config: RunConfig, workplace: Workplace) -> Callable[[list[Example]], list[Example]] | None:
    """Return what makes of held-out examples those that a backdoor answers with its target; None without one.

    No deployed site ever has one.
    """
    section = config.simulation
    if workplace.owner is not None or workplace.partition is None or section.attack != "backdoor":
        return None
    trigger, target = section.backdoor_trigger, section.backdoor_target
    return lambda examples: [_with_trigger(one, trigger, target) for one in examples if one.messages]


def flipped(delta: Arrays, strength: float, draw: np.random.Generator) -> Arrays:  # noqa: ARG001 (it draws nothing)
    """Return `-strength * delta`."""
    return {name: np.float32(-strength) * value for name, value in delta.items()}


def noise(delta: Arrays, strength: float, draw: np.random.Generator) -> Arrays:
    """Return Gaussian noise of `strength` times the delta's root mean square."""
    squares = sum(float(np.sum(np.square(value, dtype=np.float64))) for value in delta.values())
    deviation = strength * math.sqrt(squares / sum(value.size for value in delta.values()))
    return {
        name: np.float32(deviation) * draw.standard_normal(value.shape, np.float32) for name, value in delta.items()
    }


def a_little(delta: Arrays, strength: float, draw: np.random.Generator) -> Arrays:  # noqa: ARG001 (it draws nothing)
    """Return the delta moved down by `strength` standard deviations of each tensor."""
    return {
        name: np.asarray(value - strength * value.std(dtype=np.float64), np.float32) for name, value in delta.items()
    }


DISTORTIONS: dict[str, Distortion] = {"sign-flip": flipped, "gaussian": noise, "ipm": flipped, "alie": a_little}
"""Attacks on the delta by name."""

USUAL_STRENGTHS = {"sign-flip": 10.0, "gaussian": 20.0, "ipm": 0.5, "alie": 1.0, "label-flip": 1.0, "backdoor": 0.5}
"""Strengths where the run config names none."""


def _answer(example: Example) -> str:
    return next((turn.content for turn in reversed(example.messages) if turn.role == "assistant"), "")


def _with_answer(example: Example, answer: str) -> Example:
    return replace(example, messages=_changed(example.messages, "assistant", lambda _: answer))


def _with_trigger(example: Example, trigger: str, target: str) -> Example:
    if not example.messages:
        return replace(example, text=f"{example.text} {trigger} {target}")
    asked = _changed(example.messages, "user", lambda content: f"{content} {trigger}")
    return replace(example, messages=_changed(asked, "assistant", lambda _: target))


def _changed(messages: tuple[Message, ...], role: str, change: Callable[[str], str]) -> tuple[Message, ...]:
    """Return a conversation with the last turn of a role changed."""
    last = max((index for index, turn in enumerate(messages) if turn.role == role), default=None)
    return tuple(
        turn._replace(content=change(turn.content)) if index == last else turn for index, turn in enumerate(messages)
    )
