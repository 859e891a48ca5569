"""Keeps a run's figures: a listener of its events."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fedllm.config import RunConfig
from fedllm.observability.board import Board, Bounded
from fedllm.provenance import versions
from server_app.events import AnyEvent, End, Evaluation, LeftOut, Round
from server_app.observability.families import FAMILIES, MAX_SITES, OTHER, REASONS


class RunFigures:
    """The figures of one run.

    Args:
        config: The effective run config.
        spool: Folder of payloads under way; measured whenever somebody asks.
    """

    def __init__(self, config: RunConfig, spool: Path) -> None:
        self._config, self._spool = config, spool
        self._board, self._site = Board(FAMILIES), Bounded(MAX_SITES)

    def begin(self, events: Sequence[AnyEvent]) -> None:
        """Start over from what was recorded so far."""
        self._board, self._site = Board(FAMILIES), Bounded(MAX_SITES)
        self._board.set(
            "fedllm_run_info",
            1,
            strategy=self._config.strategy.name,
            adapter=self._config.adapter.kind,
            version=versions()["fedllm"],
        )
        self._board.set("fedllm_rounds_planned", self._config.num_rounds)
        for event in events:
            self.hear(event)

    def hear(self, event: AnyEvent) -> None:
        """Count one event."""
        self._board.set("fedllm_last_event_timestamp_seconds", event.time)
        match event:
            case Round():
                self._round(event)
            case Evaluation():
                self._evaluation(event)
            case LeftOut():
                self._board.add("fedllm_sites_left_out_total")
            case End():
                self._board.set("fedllm_run_ended", 1, status=event.status)

    def board(self) -> Board:
        """Return the figures as they are now."""
        sizes = _sizes(self._spool)
        self._board.set("fedllm_spool_bytes", sum(sizes))
        self._board.set("fedllm_spool_files", len(sizes))
        return self._board

    def _round(self, event: Round) -> None:
        board, is_done = self._board, event.event == "round"
        board.add("fedllm_rounds_total", outcome="done" if is_done else "in_vain")
        board.set("fedllm_participants", len(event.participants))
        for part in event.rejected:
            board.add("fedllm_updates_rejected_total", reason=part.kind if part.kind in REASONS else OTHER)
            board.add("fedllm_site_updates_total", site=self._site(part.site), outcome="rejected")
        board.add("fedllm_payload_bytes_total", event.bytes_up, direction="up")
        board.add("fedllm_payload_bytes_total", event.bytes_down, direction="down")
        board.observe("fedllm_round_seconds", event.seconds)
        for phase, seconds in event.phases.items():
            board.observe("fedllm_round_phase_seconds", seconds, phase=phase)
        if is_done:
            self._moved(event)

    def _moved(self, event: Round) -> None:
        board = self._board
        board.set("fedllm_round", event.round)
        board.add("fedllm_updates_used_total", len(event.participants))
        for site in event.participants:
            board.add("fedllm_site_updates_total", site=self._site(site), outcome="used")
        board.add("fedllm_trained_tokens_total", sum(part.num_tokens for part in event.sites.values()))
        board.add("fedllm_trained_steps_total", sum(part.num_steps for part in event.sites.values()))
        states = {
            "fedllm_train_loss": event.train_loss,
            "fedllm_update_norm": event.update_norm,
            "fedllm_discarded_energy_ratio": event.discarded_energy,
        }
        for name, value in states.items():
            if value is not None:
                board.set(name, value)

    def _evaluation(self, event: Evaluation) -> None:
        board = self._board
        board.set("fedllm_heldout_loss", event.loss, text="sites")
        board.set("fedllm_heldout_loss", event.worst_loss, text="worst_site")
        if event.central is not None:
            board.set("fedllm_heldout_loss", event.central.loss, text="central")
        board.set("fedllm_heldout_accuracy_ratio", event.accuracy)
        board.add("fedllm_payload_bytes_total", event.bytes_down, direction="down")
        board.observe("fedllm_evaluation_seconds", event.seconds)
        if event.round == 0:
            board.set("fedllm_base_heldout_loss", event.loss)
        else:
            best = min((figure.value for figure in board.figures("fedllm_best_heldout_loss")), default=event.loss)
            board.set("fedllm_best_heldout_loss", min(best, event.loss))


def _sizes(folder: Path) -> list[int]:
    """Return the size of every file below a folder; files come and go meanwhile."""
    sizes = []
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append((Path(parent) / name).stat().st_size)
            except FileNotFoundError:
                continue
    return sizes
