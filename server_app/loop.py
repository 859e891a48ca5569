"""The course of a run: gather, start or resume, rounds, comparison, results.

Everything that must survive a crash is in the run's folder: a checkpoint after every round, the events in
``metrics.jsonl``, the best adapter. Killed anywhere, a run resumed from its folder gives the same adapter bits as one that
was not, because every draw is derived from seed and round and updates are folded in a fixed order.
"""

from __future__ import annotations

import logging
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

from fedllm.codecs.pipeline import parse
from fedllm.errors import FedLLMError, QuorumError, explain
from fedllm.logs import about
from fedllm.manifest import Manifest, SiteCounts
from fedllm.messages import Introduction
from fedllm.model.export import save_peft_adapter
from fedllm.update import Layout, digest_arrays, taken
from fedllm.work import common_of
from server_app.buffered import AsynchronousTraining
from server_app.checkpoint import RunState, save_checkpoint
from server_app.evaluation import Scores, ask_prompt, evaluate, local_only, personalised
from server_app.federation import Federation
from server_app.first import first_arrays
from server_app.report import build_report
from server_app.training import train_round
from server_app.transports import SPOOL
from strategies.slots import OptimizerState

log = logging.getLogger(__name__)


@dataclass
class Loop:
    """Drives a federation through its rounds.

    Attributes:
        federation: What the phases share.
        state: Where the federation stands; None before the first round of a new run.
    """

    federation: Federation
    state: RunState | None

    def run(self) -> None:
        """Go from where the federation stands to the end.

        Raises:
            QuorumError: Too few sites joined, or a round had no quorum again and again. Everything is saved.
        """
        config = self.federation.config
        with self._ending():
            self.federation.roster.gather(config.rounds.min_sites, config.rounds.join_timeout_s)
            state = self.state or self._first_state()
            self._note_sites(state.adapter_layout)
            state = self._catch_up(state)
            while state.round < config.num_rounds:
                with about(round=state.round + 1):
                    state = self._round(state)
            self._finish(state)

    def _first_state(self) -> RunState:
        """Make the first global adapter from what the sites state; the server needs no base for it."""
        roster, introduction = self.federation.roster, self._introduction()
        work = self.federation.strategy.work.at(1)
        layout = work.state(Layout.from_json(introduction.layout))
        assert roster.agreement is not None, "gather() has settled it"
        sent = work.sent(layout)  # refuses an adapter that the strategy does not fit
        parse(self.federation.config.transport.downlink).check(layout)
        parse(self.federation.config.transport.uplink).check(sent)
        arrays = first_arrays(self.federation, layout, roster.agreement)
        return RunState(
            round=0,
            params=arrays,
            sent=arrays,
            optimizer=OptimizerState(),
            layout=layout,
            target_modules=tuple(introduction.target_modules),
            agreement=roster.agreement,
            first_id=digest_arrays(arrays, layout),
        )

    def _introduction(self) -> Introduction:
        return next(iter(self.federation.roster.members.values())).introduction

    def _catch_up(self, state: RunState) -> RunState:
        """Do what is missing for the round that the state stands after: its checkpoint, its evaluation."""
        if state.round == 0:
            self._save(state)
        if self._is_due(state.round) and not self._was_evaluated(state.round):
            self._evaluate(state)
        return state

    def _is_due(self, round_: int) -> bool:
        """Say whether the federation is evaluated after a round."""
        config = self.federation.config
        return round_ % config.evaluation.every == 0 or round_ == config.num_rounds

    def _was_evaluated(self, round_: int) -> bool:
        events = self.federation.recorder.events
        return any(event["event"] == "evaluation" and event["round"] == round_ for event in events)

    def _round(self, state: RunState) -> RunState:
        """Run one round, repeating it where there is no quorum."""
        config = self.federation.config
        round_ = state.round + 1
        for attempt in range(1, config.rounds.max_attempts + 1):
            moved = self._train(state, round_, attempt)
            if moved is not None:
                self._save(moved)
                if self._is_due(round_):
                    self._evaluate(moved)
                return moved
            log.warning("round %d, attempt %d: nothing changed", round_, attempt)
        reason = self.federation.recorder.events[-1].get("reason") or None
        fix = f'Bring the sites back, then go on with resume="{self.federation.folder.name}".'
        expected = f"{config.rounds.min_sites} usable replies (rounds.min_sites)"
        raise QuorumError(
            explain(
                f"round {round_} had no quorum {config.rounds.max_attempts} times",
                expected=expected,
                found=reason,
                fix=fix,
            )
        )

    @cached_property
    def _train(self) -> Callable[[RunState, int, int], RunState | None]:
        """What runs one attempt at a round."""
        if self.federation.strategy.buffer is None:
            return partial(train_round, self.federation)
        return AsynchronousTraining(self.federation).train_round

    def _save(self, state: RunState) -> None:
        self.federation.recorder.sync()
        save_checkpoint(self.federation.folder.checkpoints, state, self.federation.config.keep_checkpoints)

    def _evaluate(self, state: RunState) -> None:
        scores = evaluate(self.federation, state)
        if scores is not None and state.round > 0 and self._is_best(scores, state.round):
            self._export(state, self.federation.folder.best.name)

    def _is_best(self, scores: Scores, round_: int) -> bool:
        events = self.federation.recorder.events
        losses = [event["loss"] for event in events if event["event"] == "evaluation" and 0 < event["round"] < round_]
        return not losses or scores.loss < min(losses)

    def _finish(self, state: RunState) -> None:
        config, recorder = self.federation.config, self.federation.recorder
        self._export(state, self.federation.folder.adapter.name)
        done = {event["event"] for event in recorder.events}
        if config.evaluation.local_only and "local_only" not in done:
            local_only(self.federation, state)
        if "personalised" not in done:
            personalised(self.federation, state)
        if "answer" not in done:
            ask_prompt(self.federation, state)

    def _export(self, state: RunState, name: str) -> None:
        """Write the global adapter for PEFT, one of each group of sites where there are several."""
        layout = common_of(state.adapter_layout)
        for branch in state.branches:
            save_peft_adapter(
                self.federation.folder.path / (f"{name}-group-{branch.group}" if branch.group else name),
                layout,
                taken(branch.adapter, layout),
                self.federation.config.spec,
                list(branch.target_modules),
                self.federation.config.model.source,
            )

    def _note_sites(self, layout: Layout) -> None:
        """Write what the sites stated into the manifest: counts, never content."""
        folder = self.federation.folder
        manifest, roster = Manifest.read(folder.manifest), self.federation.roster
        assert roster.agreement is not None, "gather() has settled it"
        manifest.model_copy(
            update={
                "base_fingerprint": roster.agreement.base,
                "num_parameters": layout.num_parameters,
                "sites": {name: _counts(member.introduction) for name, member in sorted(roster.members.items())},
            }
        ).write(folder.manifest)

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Record how the run ends, and write the report, whatever happens."""
        recorder, folder = self.federation.recorder, self.federation.folder
        status, reason, started = "stopped", "the server was stopped", time.monotonic()
        try:
            yield
            status, reason = "finished", ""
        except FedLLMError as error:
            status, reason = "failed", str(error)
            raise
        except Exception as error:
            status, reason = "failed", f"{type(error).__name__}: {error}"
            raise
        finally:
            recorder.record(
                {
                    "event": "end",
                    "status": status,
                    "reason": reason,
                    "best_round": self._best_round(),
                    "seconds": time.monotonic() - started,
                    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                }
            )
            recorder.close()
            self.federation.transport.close()
            shutil.rmtree(folder.path / SPOOL, ignore_errors=True)
            build_report(folder)

    def _best_round(self) -> int | None:
        events = self.federation.recorder.events
        rows = [(e["loss"], e["round"]) for e in events if e["event"] == "evaluation" and e["round"] > 0]
        return min(rows)[1] if rows else None


def _counts(introduction: Introduction) -> SiteCounts:
    data = introduction.data
    return SiteCounts(
        train_examples=data.num_train_examples,
        train_tokens=data.num_train_targets,
        holdout_examples=data.num_holdout_examples,
        holdout_tokens=data.num_holdout_targets,
    )
