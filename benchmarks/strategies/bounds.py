"""What a federation is held against: every site for itself, and all data in one place.

Both begin with the federation's first adapter and take as many steps as a site of the federation, over the same course of
the learning rate. Where all data is in one place, a step takes the batches of all sites together, so that as much text is
computed as by the whole federation.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.strategies.task import flat
from client_app.session import Session, open_session
from client_app.workplace import open_workplace
from fedllm.config import RunConfig
from fedllm.messages import Hello, Score


def local_only(config: RunConfig, num_sites: int) -> dict[str, Any]:
    """Train every site for itself."""
    scores = {}
    for session in _sessions(config, num_sites):
        _train(session)
        scores[session.workplace.site] = session.score()
    return _row(scores)


def centralised(config: RunConfig, num_sites: int) -> dict[str, Any]:
    """Train once on the text of all sites."""
    sessions = _sessions(config, num_sites)
    together = replace(sessions[0].data, train=[sequence for one in sessions for sequence in one.data.train])
    train = config.train.model_copy(update={"accumulation": config.train.accumulation * num_sites})
    _train(replace(sessions[0], data=together, config=config.model_copy(update={"train": train})))
    return _row({session.workplace.site: session.score() for session in sessions})


BOUNDS = {"local_only": local_only, "centralised": centralised}


def _sessions(config: RunConfig, num_sites: int) -> list[Session]:
    """Open the federation's sites in this process; they share one model."""
    folder = Path(tempfile.gettempdir()) / "runs" / "bounds"  # a name only: nothing is written
    hello = Hello(run="bounds", run_folder=str(folder), config=flat(config))
    nodes = [{"partition-id": index, "num-partitions": num_sites} for index in range(num_sites)]
    return [open_session(hello, open_workplace(node, hello)) for node in nodes]


def _train(session: Session) -> None:
    session.train(
        session.first_values(),
        session.layout,
        first_step=0,
        num_steps=session.config.total_steps,
        round_=0,
        title=session.workplace.site,
    )


def _row(scores: Mapping[str, Score]) -> dict[str, Any]:
    tokens = sum(score.num_tokens for score in scores.values())
    losses = {site: score.loss for site, score in scores.items()}
    return {
        "heldout_loss": math.fsum(score.loss * score.num_tokens / tokens for score in scores.values()),
        "heldout_loss_worst_site": max(losses.values()),
        "sites": losses,
    }
