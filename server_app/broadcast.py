"""The global state on its way to the sites: what each of them holds, and the cheapest way to the next one.

A state is named by what a site *decodes* (:func:`fedllm.update.digest_arrays`), not by what the server has. With a lossy
downlink the two differ; what the codec dropped stays in the difference to the next state, so it is sent later (implicit
error feedback). A site gets a state in one of four ways:

- *held*: it decoded it before, for an evaluation, say; nothing travels;
- *initial*: every site makes the first state for itself, from the seed and its base; nothing travels;
- *difference*: it holds the state before and fetches the encoded difference;
- *full*: it missed a state and fetches this one whole, as float32, so that it decodes the very same bits.

Tensors that did not change do not travel: a difference holds those that the last round moved, and a whole state those
that are no longer what the seed gave. With a lossy downlink, what was dropped of a tensor waits until it moves again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedllm.codecs.payload import encode_payload, open_payload
from fedllm.codecs.pipeline import parse
from fedllm.config import RunConfig
from fedllm.messages import Delivery
from fedllm.model.initial import drawn_arrays
from fedllm.update import Arrays, Layout, digest_arrays, taken
from fedllm.wire.transport import ServerTransport
from server_app.checkpoint import RunState


@dataclass(frozen=True)
class Package:
    """An encoded state that can be fetched.

    Attributes:
        name: What the transport calls it.
        num_bytes: Its size.
        tensors: Names of the tensors in it, empty for all.
    """

    name: str
    num_bytes: int
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Broadcast:
    """One state to be sent.

    Attributes:
        round: Rounds that it is the result of.
        state_id: Its name.
        arrays: What a site decodes; empty for the first state once the federation has left it.
        reference_id: The state that the difference is to, empty if there is no difference.
        difference: The encoded difference, None if there is none.
        is_initial: It is the first one, which every site makes for itself.
    """

    round: int
    state_id: str
    arrays: Arrays
    reference_id: str = ""
    difference: Package | None = None
    is_initial: bool = False


@dataclass(frozen=True)
class Start:
    """What a site starts from.

    Attributes:
        state: Where its group of sites stands.
        broadcast: That state as it travels.
    """

    state: RunState
    broadcast: Broadcast


@dataclass(frozen=True)
class Parcel:
    """How one site gets a state: what goes into its instruction, and what the transport is to offer."""

    delivery: Delivery
    reference_id: str = ""
    package: Package | None = None


class Broadcaster:
    """Encodes states and remembers what each site holds.

    Args:
        config: The effective run config.
        transport: Where packages are published.
        folder: Where packages are written.
    """

    def __init__(self, config: RunConfig, transport: ServerTransport, folder: Path) -> None:
        self._config, self._transport, self._folder = config, transport, folder
        self._pipeline = parse(config.transport.downlink)
        self._current: dict[int, Broadcast] = {}
        self._full: dict[str, Package] = {}
        self._holds: dict[str, str] = {}

    def starts(self, state: RunState, sites: Iterable[str]) -> dict[str, Start]:
        """Return what each of these sites starts from: the state of its group."""
        return {site: Start(state.of(site), self.prepare(state.of(site))) for site in sites}

    def prepare(self, state: RunState) -> Broadcast:
        """Return the broadcast of the state that a group of sites stands at, encoded once."""
        current = self._current.get(state.group)
        if current is None or current.round != state.round:
            current = self._current[state.group] = self._encode(state)
        return current

    def initial(self, state: RunState) -> Broadcast:
        """Return the broadcast of the first state, which needs no bytes."""
        arrays = {} if state.round else state.params
        return Broadcast(0, state.first_id, arrays, is_initial=True)

    def parcel(self, site: str, broadcast: Broadcast, state: RunState) -> Parcel:
        """Choose the cheapest way for one site."""
        held = self._holds.get(site)
        if held == broadcast.state_id:
            return Parcel("held")
        if broadcast.is_initial:
            return Parcel("initial")
        difference = broadcast.difference
        if difference is not None and broadcast.reference_id in (held, ""):
            delivery: Delivery = "difference" if broadcast.reference_id else "full"
            return Parcel(delivery, broadcast.reference_id, difference)
        return Parcel("full", package=self._whole(broadcast, state))

    def confirm(self, site: str, state_id: str) -> None:
        """Note that a site has decoded a state."""
        self._holds[site] = state_id

    def forget(self, site: str) -> None:
        """Note that a site cannot be relied on to hold anything."""
        self._holds.pop(site, None)

    def _encode(self, state: RunState) -> Broadcast:
        if state.round == 0:
            return self.initial(state)
        path = self._folder / f"state-{_numbered(state)}.payload"
        refers = self._pipeline.needs_reference
        rest = state.sent if refers else drawn_arrays(state.layout, self._config.seed)
        part = _moved(state) if refers else _different(state.params, rest, state.layout)
        reference = taken(rest, part) if refers else None
        reference_id = digest_arrays(state.sent, state.layout) if refers else ""
        path.parent.mkdir(parents=True, exist_ok=True)
        info = encode_payload(
            path,
            taken(state.params, part),
            part,
            kind="state",
            round_=state.round,
            base=state.agreement.base,
            pipeline=self._pipeline,
            reference_id=reference_id,
            reference=reference,
            seed=self._config.seed,
        )
        self._transport.publish(path.stem, path)
        with open_payload(path, layout=part, base=state.agreement.base, reference=reference) as payload:
            arrays = rest | {name: payload.restore(name) for name in payload.names}
        package = Package(path.stem, info.num_bytes, _named(part, state.layout))
        return Broadcast(state.round, digest_arrays(arrays, state.layout), arrays, reference_id, package)

    def _whole(self, broadcast: Broadcast, state: RunState) -> Package:
        """Return the state as float32, encoded when the first site needs it."""
        if broadcast.state_id not in self._full:
            path = self._folder / f"full-{_numbered(state)}.payload"
            path.parent.mkdir(parents=True, exist_ok=True)
            part = _different(broadcast.arrays, drawn_arrays(state.layout, self._config.seed), state.layout)
            info = encode_payload(
                path,
                taken(broadcast.arrays, part),
                part,
                kind="state",
                round_=broadcast.round,
                base=state.agreement.base,
                pipeline="fp32",
            )
            self._transport.publish(path.stem, path)
            current = {one.state_id for one in self._current.values()}
            self._full = {name: package for name, package in self._full.items() if name in current}
            self._full[broadcast.state_id] = Package(path.stem, info.num_bytes, _named(part, state.layout))
        return self._full[broadcast.state_id]


def _numbered(state: RunState) -> str:
    return f"{state.round:05d}" + (f"-{state.group}" if state.group else "")


def _moved(state: RunState) -> Layout:
    return state.layout.only(state.moved) if state.moved else state.layout


def _different(arrays: Arrays, drawn: Arrays, layout: Layout) -> Layout:
    """Return the tensors that are not as they were drawn; all where none differs, since a package is never empty."""
    names = [name for name in layout.names if name not in drawn or not np.array_equal(arrays[name], drawn[name])]
    part = layout.only(names)
    return part if part.tensors else layout


def _named(part: Layout, layout: Layout) -> tuple[str, ...]:
    return () if part == layout else part.names
