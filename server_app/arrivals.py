"""A site's update as it arrives: opened in the site's own shapes, read in the federation's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedllm.codecs.payload import PayloadReader, open_payload
from fedllm.config import RunConfig
from fedllm.lora.cut import narrow, narrowed
from fedllm.messages import TrainReport
from fedllm.update import Layout
from fedllm.work import ClientWork
from server_app.broadcast import Start
from server_app.checkpoint import RunState
from server_app.federation import Federation
from server_app.pruning import ranks_of
from strategies.parts import in_part
from strategies.slots import UpdateSource
from strategies.widened import Widened


@dataclass(frozen=True)
class Arrivals:
    """Opens the updates of one round.

    Attributes:
        config: The run's.
        layout: The tensors that updates hold, in the federation's shapes.
        starts: What the sites started from.
        work: What they were asked to do.
        round: The round that is under way.
        ranks: How many components of a LoRA adapter a site trains, 0 for all.
    """

    config: RunConfig
    layout: Layout
    starts: Mapping[str, Start]
    work: ClientWork
    round: int
    ranks: Mapping[str, int]

    def open(self, path: Path, report: TrainReport) -> PayloadReader:
        """Open a site's update; what is in it is checked against the site's layout before memory is set aside for it.

        Raises:
            PayloadError, LayoutError, AgreementError: It is not this site's update of this round.
        """
        start, rank = self.starts[report.site], self.ranks[report.site]
        chosen = self.work.chosen(self.layout, report.tensors)
        received = start.broadcast.arrays
        return open_payload(
            path,
            layout=narrowed(chosen, rank) if rank else chosen,
            base=start.state.agreement.base,
            max_bytes=self.config.transport.max_update_bytes,
            kind="update",
            round_=self.round,
            reference_id=start.broadcast.state_id,
            reference=narrow(received, chosen, rank) if rank else received,
        )

    def in_full(self, payload: PayloadReader, report: TrainReport) -> UpdateSource:
        """Return an open update as one of the federation's tensors and shapes."""
        rank = self.ranks[report.site]
        source: UpdateSource = Widened(payload, self.layout, rank) if rank else payload
        return in_part(source, self.layout, report.tensors, report.num_virtual_tokens)


def arrivals(federation: Federation, state: RunState, starts: Mapping[str, Start], round_: int) -> Arrivals:
    """Return what opens the updates of a round."""
    work = federation.strategy.work.at(round_)
    return Arrivals(federation.config, work.sent(state.layout), starts, work, round_, ranks_of(federation))
