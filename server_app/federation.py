"""What the phases of a run share, and the state that the federation is in: see :mod:`server_app.loop` for the course."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedllm.codecs.payload import encode_payload
from fedllm.config import RunConfig, Scalar, flatten
from fedllm.runs import RunFolder
from fedllm.update import Arrays
from fedllm.wire.transport import Envelope, ServerTransport
from server_app.checkpoint import RunState
from server_app.exchange import Exchange
from server_app.recorder import Recorder
from server_app.roster import Roster
from strategies.slots import Strategy


@dataclass(frozen=True)
class Broadcast:
    """An encoded global state that sites can fetch.

    Attributes:
        state_id: The payload's digest.
        num_bytes: Its size.
        arrays: What a site decodes from it.
    """

    state_id: str
    num_bytes: int
    arrays: Arrays


@dataclass
class Federation:
    """What the phases of a run share.

    Attributes:
        config: The effective run config.
        folder: The run's folder.
        recorder: Metrics, TensorBoard and story.
        exchange: The way to the sites.
        roster: Who takes part.
        strategy: The four slots.
        transport: How payloads travel.
    """

    config: RunConfig
    folder: RunFolder
    recorder: Recorder
    exchange: Exchange
    roster: Roster
    strategy: Strategy
    transport: ServerTransport

    @property
    def instruction(self) -> dict[str, object]:
        """Fields that every instruction has."""
        flat: dict[str, Scalar] = flatten(self.config)
        return {"run": self.folder.name, "run_folder": str(self.folder.path), "config": flat}

    @property
    def home(self) -> Path:
        """Folder that holds ``runs/``; relative paths start there."""
        return self.folder.path.parent.parent

    @property
    def spool(self) -> Path:
        """Folder of payloads under way, emptied when the server starts."""
        return self.folder.path / "spool"

    def broadcast(self, state: RunState, arrays: Arrays, name: str) -> Broadcast:
        """Encode a state, make it available, and return what a site will decode from it.

        Args:
            state: Where the federation stands.
            arrays: What to send.
            name: File name of the payload without suffix.
        """
        path = self.spool / f"{name}.payload"
        path.parent.mkdir(parents=True, exist_ok=True)
        info = encode_payload(
            path,
            arrays,
            state.layout,
            kind="state",
            round_=state.round,
            base=state.agreement.base,
            pipeline=self.config.transport.downlink,
            seed=self.config.seed,
            want_decoded=True,
        )
        assert info.decoded is not None, "asked for"
        self.transport.publish(info.digest, path)
        return Broadcast(info.digest, info.num_bytes, info.decoded)

    def offer(self, round_: int, site: str, state_id: str, *, with_update: bool) -> Envelope:
        """Return the transport's part of an instruction to one site."""
        limit = self.config.transport.max_update_bytes if with_update else 0
        return self.transport.offer(round_=round_, site=site, state_id=state_id, max_update_bytes=limit)


class Stopwatch:
    """Seconds by phase, in the order in which the phases ran."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one phase; the same name adds up."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start

    @property
    def seconds(self) -> float:
        """Seconds since the stopwatch was made."""
        return time.perf_counter() - self._start
