"""Sites that give up LoRA components on their own: what is left of them, as the run's events say.

A site says with its update how many components it goes on with (HetLoRA). That counts from the next round on if the update
was folded, and is part of every instruction, so a server that goes back to a checkpoint asks for what it asked for then.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedllm.config import RunConfig
from fedllm.errors import UpdateError, explain
from fedllm.lora.choice import rank_at, rank_without_tail
from fedllm.messages import TrainReport
from fedllm.model.spec import LoraSpec
from fedllm.runs import Event
from fedllm.work import ClientWork
from server_app.federation import Federation


def ranks_of(federation: Federation) -> dict[str, int]:
    """Return how many components of a LoRA adapter each site trains next, 0 for all."""
    left, ranks = _left(federation.recorder.events), {}
    for name, member in federation.roster.members.items():
        chosen = rank_at(federation.config, member.introduction)
        ranks[name] = min(left[name], chosen or left[name]) if name in left else chosen
    return ranks


def check_next_rank(config: RunConfig, work: ClientWork, report: TrainReport, rank: int) -> None:
    """Refuse a report of components given up that the round's work does not provide for.

    Args:
        config: The run's.
        work: What the site was asked to do.
        report: What it says.
        rank: Components that it was to train, 0 for all.

    Raises:
        UpdateError: It says something else than what is left without the tail.
    """
    adapter = config.spec.adapter
    if not report.next_rank:
        return
    trained = rank or adapter.rank if isinstance(adapter, LoraSpec) else 0
    fewest = adapter.min_rank if isinstance(adapter, LoraSpec) else 0
    expected = rank_without_tail(trained, work.pruning, fewest)
    if report.next_rank != expected or expected == trained:
        raise UpdateError(
            explain("a site gives up other components than its last ones", expected=expected, found=report.next_rank)
        )


def _left(events: Iterable[Event]) -> dict[str, int]:
    """Return the components that are left of each site that has given some up."""
    left: dict[str, int] = {}
    rounds = (event for event in events if event["event"] == "round")
    for site, part in ((site, part) for event in rounds for site, part in event["sites"].items()):
        if rank := part.get("next_rank", 0):
            left[site] = min(rank, left.get(site, rank))  # of two late updates, the one that gave up more
    return left
