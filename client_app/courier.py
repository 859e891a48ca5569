"""One instruction's way through a site: the state comes in, training starts from it, the update goes out, the rest stays.

Nothing here knows a model: arrays come in and go out, in the layouts that the instruction's work describes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from client_app.attacks import Attack
from client_app.choice import most_changed
from client_app.kept import Kept
from client_app.memory import Memory
from client_app.site import SiteConfig
from client_app.transports import build_transport, hand_over
from client_app.variates import Variates
from fedllm.codecs.feedback import ErrorFeedback, relative_norm
from fedllm.codecs.payload import encode_payload, open_payload
from fedllm.codecs.pipeline import parse
from fedllm.config import RunConfig
from fedllm.errors import AgreementError, CorruptPayloadError, StaleStateError, explain
from fedllm.lora.cut import narrow, narrowed
from fedllm.messages import StateInstruction, TrainInstruction
from fedllm.update import Arrays, Layout, digest_arrays, taken, zeros
from fedllm.wire.transport import Envelope
from fedllm.work import adapter_of, control_of

log = logging.getLogger(__name__)

LOST = "what the site kept of earlier rounds is lost; it starts over from the first values"


@dataclass(frozen=True)
class Update:
    """What goes out.

    Attributes:
        path: The encoded update.
        residual_norm: Norm of what is left unsent now over the norm of the update, 0 without feedback.
        decoded: What the server will decode, empty where nobody here needs it.
        tensors: Names of the tensors that it holds, empty where the site had no choice.
    """

    path: Path
    residual_norm: float
    decoded: Arrays
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Courier:
    """Carries what one instruction needs and yields.

    Attributes:
        instruction: What is asked.
        envelope: What the transport added.
        config: The run config.
        site: The site's name.
        state_dir: The site's files for this run.
        adapter: The layout of the federation's adapter, which the site holds.
        first_values: Makes what that adapter starts from.
        rank: How many of its components the site trains, for LoRA.
        base: Fingerprint of the base that it holds.
        owner: The data owner's file in deployment.
        attack: What the site does as a simulated attacker, None for an honest one.
    """

    instruction: StateInstruction
    envelope: Envelope
    config: RunConfig
    site: str
    state_dir: Path
    adapter: Layout
    first_values: Callable[[], Arrays]
    rank: int
    base: str
    owner: SiteConfig | None
    attack: Attack | None = None

    @cached_property
    def layout(self) -> Layout:
        """The state's layout."""
        return self.instruction.work.state(self.adapter)

    @cached_property
    def memory(self) -> Memory:
        """What the site remembers of this run."""
        return Memory(self.state_dir, self.layout, self.base)

    def obtain(self) -> Arrays:
        """Return the global state that the instruction starts from, the same bits as at every other site.

        Raises:
            AgreementError: The server's layout or base is another one.
            StaleStateError: The site does not hold what the server thought.
            PayloadError: What arrived is not the state.
        """
        self._check_agreed()
        name = self.instruction.state_id
        held = self.memory.held(name)
        if held is not None:
            return held
        arrays = self._received()
        found = digest_arrays(arrays, self.layout)
        if found != name:
            raise CorruptPayloadError(explain("a state has another name after decoding", expected=name, found=found))
        self.memory.hold(name, arrays, getattr(self.instruction, "round", 0))
        return arrays

    def _received(self) -> Arrays:
        asked = self.instruction
        if asked.delivery == "initial":
            return self.first_state()
        reference = None
        if asked.delivery != "full":
            reference = self.memory.held(asked.reference_id)
        if asked.delivery == "held" or (asked.delivery == "difference" and reference is None):
            wanted = asked.reference_id or asked.state_id
            raise StaleStateError(explain("the site does not hold a state", expected=wanted, where="state directory"))
        part = self.layout.only(asked.tensors) if asked.tensors else self.layout
        self.memory.folder.mkdir(parents=True, exist_ok=True)  # a site that joins later has kept nothing yet
        path = build_transport(self.envelope, self.owner).fetch(self.envelope, self.memory.folder / "arrived.payload")
        with open_payload(
            path, layout=part, base=self.base, kind="state", reference_id=asked.reference_id, reference=reference
        ) as payload:
            arrays = {name: payload.restore(name) for name in payload.names}
        path.unlink()
        return (reference or self.first_state()) | arrays

    def first_state(self) -> Arrays:
        """Return the state that the federation starts from: the adapter's first values, control variates of zero."""
        return self.first_values() | zeros(control_of(self.layout))

    def own(self, state: Arrays, round_: int) -> tuple[Arrays, str]:
        """Return the adapter that is the site's own after a round: the state's, with what the site keeps in its place.

        Args:
            state: The global state.
            round_: The round, 0 before the first.

        Returns:
            The adapter, and what a person should know about it, empty for nothing.
        """
        adapter = taken(state, adapter_of(self.layout))
        kept = self.kept
        if not kept.layout.tensors:
            return adapter, ""
        found = kept.after(round_)
        is_lost = found is None and self._last_folded > 0
        if is_lost:
            log.warning(LOST)
        return adapter | (found or kept.first()), LOST if is_lost else ""

    @cached_property
    def kept(self) -> Kept:
        """The adapter's tensors that stay at the site."""
        return Kept(self.memory, self.instruction.work.kept(self.adapter), self.first_state)

    def variates(self, received: Arrays) -> Variates | None:
        """Return the control variates of this round, None where the work has none."""
        if not self.instruction.work.control_variates:
            return None
        kept = Kept(self.memory, control_of(self.layout), self.first_state)
        return Variates(kept, self._last_folded, received)

    @property
    def _last_folded(self) -> int:
        return getattr(self.instruction, "last_folded", 0)

    def encode(self, received: Arrays, trained: Arrays, change: Arrays | None = None) -> Update:
        """Encode what a round changed, with what earlier rounds left unsent, and keep what does not travel.

        Args:
            received: The state that the round started from.
            trained: The adapter after it.
            change: Of the control variates, which need no feedback: what a codec drops of them is in their next change.
        """
        asked = self.instruction
        assert isinstance(asked, TrainInstruction), "only training has an update"
        part, path = asked.work.sent(self.layout), self.memory.update_path(asked.round)
        shared = adapter_of(part)
        sent = narrowed(shared, self.rank)
        if self.kept.layout.tensors:
            self.kept.keep(asked.round, taken(trained, self.kept.layout))
        delta: Arrays = {name: trained[name] - received[name] for name in shared.names}
        if self.attack is not None:
            delta = self.attack.distort(delta, asked.round)
        chosen = most_changed(delta, received, asked.work.num_chosen(part)) if asked.work.share < 1 else []
        if chosen:
            part = shared = part.only(chosen)
            delta = taken(delta, part)
        sent = narrowed(shared, self.rank)
        delta = narrow(delta, shared, self.rank)
        feedback = self._feedback()
        intended = self._compensated(feedback, delta, sent, asked) if feedback else delta
        info = encode_payload(
            path,
            intended | (change or {}),
            narrowed(part, self.rank),
            kind="update",
            round_=asked.round,
            base=self.base,
            pipeline=self.config.transport.uplink,
            reference_id=asked.state_id,
            reference=narrow(received, part, self.rank),
            is_difference=True,
            seed=self.config.seed,
            site=self.site,
            site_index=asked.site_index,
            want_decoded=feedback is not None or change is not None,
        )
        decoded = info.decoded or {}
        if feedback is None:
            return Update(path, 0.0, decoded, tuple(chosen))
        residual = feedback.residual(intended, decoded)
        self.memory.keep_residual(asked.round, sent, residual)
        return Update(path, relative_norm(residual, delta), decoded, tuple(chosen))

    def _feedback(self) -> ErrorFeedback | None:
        transport = self.config.transport
        is_lossless = parse(transport.uplink).is_lossless
        if not transport.error_feedback or is_lossless or not self.instruction.work.carries_residual:
            return None
        return ErrorFeedback(transport.feedback_beta, transport.feedback_max_age)

    def _compensated(self, feedback: ErrorFeedback, delta: Arrays, part: Layout, asked: TrainInstruction) -> Arrays:
        left = self.memory.residual(asked.round, part, asked.last_folded)
        return feedback.compensate(delta, feedback.carried(*left) if left else None)

    def push(self, update: Path) -> Envelope:
        """Deliver an encoded update; return what goes into the reply."""
        return hand_over(self.instruction, self.envelope, self.owner, update)

    def _check_agreed(self) -> None:
        asked = self.instruction
        pairs = {"layout": (asked.layout, self.layout.digest), "base": (asked.base, self.base)}
        for what, (theirs, ours) in pairs.items():
            if theirs != ours:
                fix = "Bring the site to the federation's model, or leave it out."
                raise AgreementError(explain(f"the {what} differs", expected=theirs, found=ours, fix=fix))
