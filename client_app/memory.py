"""What a site remembers of a run between rounds, in files of its state directory.

::

    <state_dir>/
        held.payload               the global state that the site decoded last, as float32
        round-00003.update         the encoded update of a round, kept until the server has folded it
        round-00003.report         what was said of it, and for which request
        round-00003.kept-1a2b3c4d       tensors that stay at the site, see :mod:`client_app.kept`
        round-00003.residual-1a2b3c4d   what error feedback keeps back after it, of the tensors whose layout has this digest

Every file is replaced whole. Nothing is kept in Flower's ``Context.state``, which loses large values without a word and
dies with the SuperNode. A residual belongs to its round: a server that died in round 3 and asks for round 3 again gets an
update that starts from the residual of round 2, so the repeated round gives the same bits.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedllm.codecs.payload import encode_payload, open_payload
from fedllm.errors import FedLLMError
from fedllm.files import atomic_write
from fedllm.update import Arrays, Layout, check_arrays

log = logging.getLogger(__name__)

KEPT_ROUNDS = 3
"""Rounds whose updates and residuals stay on disk, for a server that goes back to its last checkpoint."""


@dataclass(frozen=True)
class Memory:
    """A site's files for one run.

    Attributes:
        folder: The state directory of this run; made when first written to.
        layout: The adapter's layout.
        base: Fingerprint of the base.
    """

    folder: Path
    layout: Layout
    base: str

    def held(self, state_id: str) -> Arrays | None:
        """Return the state of that name if the site holds it and its file is whole."""
        try:
            with open_payload(self._held, layout=self.layout, base=self.base, kind="state", reference_id="") as payload:
                if (self.folder / "held.name").read_text() != state_id:
                    return None
                return {name: payload.read(name) for name in payload.names}
        except FileNotFoundError:
            return None
        except (OSError, FedLLMError) as error:
            log.warning("the state that was kept cannot be used: %s", error)
            return None

    def hold(self, state_id: str, arrays: Arrays, round_: int) -> None:
        """Keep a decoded state in place of the one before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "held.name").unlink(missing_ok=True)
        encode_payload(self._held, arrays, self.layout, kind="state", round_=round_, base=self.base, pipeline="fp32")
        atomic_write(self.folder / "held.name", state_id)

    def finished(self, round_: int, request: str) -> tuple[Path, str] | None:
        """Return the update and the report of a round that was done for this very request, None if there is none."""
        update, report = self.file(round_, "update"), self.file(round_, "report")
        if not (update.is_file() and report.is_file()):
            return None
        found, _, text = report.read_text().partition("\n")
        return (update, text) if found == request else None

    def finish(self, round_: int, request: str, report: str, last_folded: int = 0) -> None:
        """Note that a round's update is done, and forget rounds that no server goes back to."""
        atomic_write(self.file(round_, "report"), f"{request}\n{report}")
        for kind in {path.suffix.removeprefix(".") for path in self.folder.glob("round-*.*")}:
            done = [number for number in self.rounds(kind) if number <= round_]
            for number in done[:-KEPT_ROUNDS]:
                if number != last_folded:
                    self.file(number, kind).unlink()

    def update_path(self, round_: int) -> Path:
        """Return where a round's encoded update belongs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file(round_, "report").unlink(missing_ok=True)
        return self.file(round_, "update")

    def residual(self, round_: int, part: Layout, last_folded: int) -> tuple[Arrays, int] | None:
        """Return what earlier rounds left unsent of the same tensors, and the age in rounds; None if nothing did.

        Where the server never folded the last update of these tensors, all of it was left unsent.

        Args:
            round_: The round that starts.
            part: The tensors that it sends.
            last_folded: The last round in which the server folded this site's update.
        """
        earlier = [number for number in self.rounds(_residual_of(part)) if number < round_]
        if not earlier:
            return None
        last = max(earlier)
        arrays = self._load_residual(last, part)
        if arrays is None:
            return None
        if last > last_folded:
            self._add_unsent(arrays, last, part)
        return arrays, round_ - last

    def keep_residual(self, round_: int, part: Layout, arrays: Arrays) -> None:
        """Keep what a round left unsent of the tensors that it sent."""
        atomic_write(self.file(round_, _residual_of(part)), save(arrays))

    @property
    def _held(self) -> Path:
        return self.folder / "held.payload"

    def file(self, round_: int, kind: str) -> Path:
        """Return where a round's file of a kind belongs."""
        return self.folder / f"round-{round_:05d}.{kind}"

    def rounds(self, kind: str) -> list[int]:
        """Return the rounds of which there is a file of a kind, in order."""
        return sorted(int(path.stem.removeprefix("round-")) for path in self.folder.glob(f"round-*.{kind}"))

    def _load_residual(self, round_: int, part: Layout) -> Arrays | None:
        try:
            arrays = load(self.file(round_, _residual_of(part)).read_bytes())
            check_arrays(arrays, part, "the residual")
        except (OSError, SafetensorError, FedLLMError) as error:
            log.warning("the residual of round %d cannot be used and is dropped: %s", round_, error)
            return None
        return arrays

    def _add_unsent(self, arrays: Arrays, round_: int, part: Layout) -> None:
        path = self.file(round_, "update")
        try:
            with open_payload(path, layout=part, base=self.base, kind="update") as payload:
                for name in payload.names:
                    arrays[name] = arrays[name] + payload.read(name)
        except (OSError, FedLLMError) as error:
            log.warning("the update of round %d, which the server did not take, is lost: %s", round_, error)


def _residual_of(part: Layout) -> str:
    return f"residual-{part.digest[:8]}"
