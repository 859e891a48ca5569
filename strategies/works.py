"""What sites do in each round."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.work import ClientWork


@dataclass(frozen=True)
class Always:
    """The same work in every round."""

    work: ClientWork

    def at(self, round_: int) -> ClientWork:  # noqa: ARG002
        """Return the work."""
        return self.work


@dataclass(frozen=True)
class InTurn:
    """Several works, one after the other, from the first again after the last."""

    works: tuple[ClientWork, ...]

    def at(self, round_: int) -> ClientWork:
        """Return the work whose turn it is."""
        return self.works[(round_ - 1) % len(self.works)]


@dataclass(frozen=True)
class FirstThen:
    """One work in the first round, and another from then on."""

    first: ClientWork
    then: ClientWork

    def at(self, round_: int) -> ClientWork:
        """Return the round's work."""
        return self.first if round_ == 1 else self.then
