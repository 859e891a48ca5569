"""What sites count in a weighted aggregate: what they claim, but none more than a share of the round's weight.

A site says itself how many examples it has, and nobody can check it: one that claims a billion would own every weighted
mean. The bound takes the excess from whoever claims more and leaves the others' proportions as they are (water filling):
with the sites C cut and the rest claiming S together, each of C counts ``cap S / (1 - |C| cap)``.

The default of 0.5 means that no site outweighs all others together, which is what every rule that speaks of an honest
majority takes for granted. Of two sites none is cut: there is no majority to hold either to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedllm.config import RunConfig

FEWEST = 3
"""Sites from which on there is a majority that a weight can be held to."""

_IGNORE_WEIGHTS = ("median", "trimmed-mean", "krum", "multi-krum", "fltrust")
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Cut:
    """A site that counts less than it claims.

    Attributes:
        site: Its name.
        claimed: Share of the round's weight by what the sites say.
        counted: Share that it has.
    """

    site: str
    claimed: float
    counted: float


def heeds_weights(config: RunConfig) -> bool:
    """Tell whether what sites claim to have decides what they count."""
    return config.strategy.aggregator not in _IGNORE_WEIGHTS and config.strategy.name != "hetlora"


def bounded(claims: Mapping[str, float], cap: float) -> dict[str, float]:
    """Return weights of which none is more than a share of their sum.

    Where nobody exceeds it, they are the claims, bit for bit. Where that cannot be, because there are fewer sites than
    ``1 / cap``, all count the same.

    Args:
        claims: By site, positive and finite.
        cap: The largest share, above 0 and at most 1.
    """
    if len(claims) < FEWEST:
        return dict(claims)
    if cap * len(claims) <= 1:
        return dict.fromkeys(claims, 1.0)
    highest = _highest(sorted(claims.values(), reverse=True), cap)
    return {site: min(claim, highest) for site, claim in claims.items()}


def cut(claims: Mapping[str, float], weights: Mapping[str, float]) -> tuple[Cut, ...]:
    """Return the sites whose share is less than they claim."""
    claimed, counted = _shares(claims), _shares(weights)
    rows = (Cut(site, claimed[site], counted[site]) for site in sorted(claims))
    return tuple(row for row in rows if row.counted < row.claimed * (1 - _ROUNDING))


def _highest(falling: list[float], cap: float) -> float:
    """Return the weight that none may exceed."""
    for num_cut, largest in enumerate(falling):
        room = 1 - num_cut * cap
        highest = cap * math.fsum(falling[num_cut:]) / room
        if largest <= highest or room <= cap * (1 + _ROUNDING):
            return highest
    raise AssertionError("with more sites than 1 / cap, not all of them exceed it")


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    whole = math.fsum(weights.values())
    return {site: weight / whole for site, weight in weights.items()}
