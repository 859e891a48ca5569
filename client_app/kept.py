"""What a site keeps to itself: tensors that no message carries, by round, in its state directory.

One mechanism serves every strategy that leaves something at the site: factors that are not averaged, layers that stay
local, a private adapter beside the shared one, the control variates of SCAFFOLD::

    <state_dir>/round-00003.kept-1a2b3c4d     as they were after round 3; the tensors whose layout has this digest

A file is replaced whole and belongs to its round: a server that died in round 3 and asks for round 3 again gets an
update that starts from what was kept before it, so the repeated round gives the same bits. A site that has lost its
files starts over from the first values and says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.numpy import load, save

from client_app.memory import Memory
from fedllm.errors import FedLLMError
from fedllm.files import atomic_write
from fedllm.update import Arrays, Layout, check_arrays, taken

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """A site's private tensors over the rounds.

    Attributes:
        memory: The site's files for this run.
        layout: The tensors.
        start: Makes the values that a site starts from, of these tensors and perhaps others.
    """

    memory: Memory
    layout: Layout
    start: Callable[[], Arrays]

    def after(self, round_: int) -> Arrays | None:
        """Return the values as they were after a round, or the last one before it that the site worked in; None if there
        are none, or if they are damaged.
        """
        rounds = [number for number in self.memory.rounds(self._kind) if number <= round_]
        return self._load(max(rounds)) if rounds else None

    def at(self, round_: int) -> Arrays | None:
        """Return the values as they were after this very round; None if there are none."""
        return self._load(round_) if round_ in self.memory.rounds(self._kind) else None

    def first(self) -> Arrays:
        """Return the values that a site starts from."""
        return taken(self.start(), self.layout)

    def keep(self, round_: int, arrays: Arrays) -> None:
        """Keep the values after a round."""
        atomic_write(self.memory.file(round_, self._kind), save(arrays))

    @property
    def _kind(self) -> str:
        return f"kept-{self.layout.digest[:8]}"

    def _load(self, round_: int) -> Arrays | None:
        path = self.memory.file(round_, self._kind)
        try:
            arrays = load(path.read_bytes())
            check_arrays(arrays, self.layout, str(path))
        except (OSError, SafetensorError, FedLLMError) as error:
            log.warning("what was kept of round %d cannot be used: %s", round_, error)
            return None
        return {name: arrays[name] for name in self.layout.names}
