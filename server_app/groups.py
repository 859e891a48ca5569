"""Sites in groups, each with a global adapter of its own: found once by the strategy, kept in the checkpoint.

Until the groups are found all sites share one state. From then on a round moves each group's state along the updates of
its own sites. A site that has no group, because it took no part in the round that found them or joined later, belongs to
group 0, the largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from server_app.checkpoint import RunState
from strategies.slots import Measurements

T = TypeVar("T")


def divided(state: RunState, groups: Mapping[str, int]) -> RunState:
    """Return a state as the common start of new groups.

    Args:
        state: Where all sites stand.
        groups: Group by site; numbers are 0 and up, without gaps.
    """
    numbers = range(1, 1 + max(groups.values(), default=0))
    return replace(state, groups=dict(groups), others=tuple(replace(state, group=number) for number in numbers))


def by_group(state: RunState, accepted: Mapping[str, T]) -> Iterator[tuple[RunState, dict[str, T]]]:
    """Yield the state of each group with what its own sites sent, which may be nothing."""
    for branch in state.branches:
        yield branch, {site: reply for site, reply in accepted.items() if state.of(site).group == branch.group}


def joined(state: RunState, moved: Sequence[RunState]) -> RunState:
    """Return the federation's state after a round.

    Args:
        state: The one before it, with the groups.
        moved: The states of all groups after it.
    """
    return replace(moved[0], groups=state.groups, others=tuple(moved[1:]))


def measured_together(measured: Sequence[Measurements]) -> dict[str, float]:
    """Return the measurements of all groups under one roof: of several groups, the largest step stands for the round."""
    if len(measured) == 1:
        return dict(measured[0])
    rows = {f"group-{number}/{name}": value for number, one in enumerate(measured) for name, value in one.items()}
    return {**rows, "delta_norm": max(one.get("delta_norm", 0.0) for one in measured)}
