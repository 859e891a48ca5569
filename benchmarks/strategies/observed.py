"""How far an aggregate is from what it should be, by what the sites' models really apply."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.observed_sites import ObservedSite, Update

ALIKE = 1e-5
"""Relative difference up to which two sites apply the same."""


def exactness_error(sites: Sequence[ObservedSite], round_: int) -> float | None:
    """Return how far what the sites apply after a round is from the weighted mean of what they applied at its end.

    It is the norm of the difference over that of the mean, all layers together, in float64. `None` where there is nothing
    to compare: sites apply adapters of their own, or adapters that are no change of weights, or did not all train in the
    last round, as where the server does not wait for all.
    """
    if any(round_ not in site.trained or round_ not in site.evaluated for site in sites):
        return None
    trained, found = [site.trained[round_] for site in sites], [site.evaluated[round_] for site in sites]
    if not found[0] or any(_distance(one, found[0]) > ALIKE * _norm(found[0]) for one in found):
        return None
    whole = sum(weight for weight, _ in trained)
    ideal = {name: np.asarray(sum(weight / whole * applied[name] for weight, applied in trained)) for name in found[0]}
    return _distance(found[0], ideal) / _norm(ideal)


def _distance(one: Update, other: Update) -> float:
    return _norm({name: value - other[name] for name, value in one.items()})


def _norm(applied: Update) -> float:
    return float(np.sqrt(sum(np.sum(value**2) for value in applied.values())))
