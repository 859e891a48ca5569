"""Counts the work of a site in a file, because the process that works ends with its work.

::

    <state_dir>/figures.json     the board, replaced whole
    <state_dir>/figures.lock     held while it is

Whoever lives longer shows it: the site's service (:mod:`client_app.observability.show`), or ``fedllm site metrics``. A
figure that cannot be written is given up with a warning; the work goes on.
"""

from __future__ import annotations

import logging
import resource
import sys
import time

from pydantic import TypeAdapter, ValidationError

from client_app.observability.families import KINDS, work_families
from client_app.site import SiteConfig
from fedllm.errors import PolicyError
from fedllm.files import atomic_write, locked
from fedllm.messages import AnyMessage, EvaluateReport, Instruction, TrainReport
from fedllm.observability.board import Board, Figure
from fedllm.wire.transport import Envelope

log = logging.getLogger(__name__)

FILE, LOCK = "figures.json", "figures.lock"

_FIGURES: TypeAdapter[list[Figure]] = TypeAdapter(list[Figure])


class Tally:
    """Counts one message and what became of it.

    Args:
        owner: The data owner's file.
        instruction: The message.
    """

    def __init__(self, owner: SiteConfig, instruction: Instruction) -> None:
        kind = str(getattr(instruction, "kind", ""))
        self._owner, self._kind = owner, kind if kind in KINDS else "other"
        self._start = time.perf_counter()

    def done(self, reply: AnyMessage, back: Envelope | None) -> None:
        """Count work that was done.

        Args:
            reply: The answer as it leaves.
            back: What the transport added to it.
        """
        self._count("done", reply, back)

    def failed(self, error: Exception) -> None:
        """Count a refusal, or work that could not be done."""
        self._count("refused" if isinstance(error, PolicyError) else "failed")

    def _count(self, outcome: str, reply: AnyMessage | None = None, back: Envelope | None = None) -> None:
        seconds, folder = time.perf_counter() - self._start, self._owner.paths.state_dir
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locked(folder / LOCK):
                board = read_board(self._owner)
                board.add("fedllm_site_tasks_total", kind=self._kind, outcome=outcome)
                board.observe("fedllm_site_task_seconds", seconds, kind=self._kind)
                board.set("fedllm_site_last_task_timestamp_seconds", time.time())
                _memory(board)
                _work(board, reply, back)
                content = _FIGURES.dump_json(list(board.figures()))
                atomic_write(folder / FILE, content, durable=False, mode=0o600)
        except OSError as error:
            log.warning("figures of this site cannot be written: %s", error)


def read_board(owner: SiteConfig) -> Board:
    """Return what was counted so far; a file that cannot be read begins anew with a warning."""
    path = owner.paths.state_dir / FILE
    try:
        figures = _FIGURES.validate_json(path.read_bytes())
    except FileNotFoundError:
        figures = []
    except (OSError, ValidationError) as error:
        log.warning("figures of this site begin anew, since %s cannot be read: %s", path.name, type(error).__name__)
        figures = []
    return Board(work_families(owner.sharing), figures)


def _work(board: Board, reply: AnyMessage | None, back: Envelope | None) -> None:
    sent = back.fields.get("size", 0) if back else 0
    if isinstance(sent, int) and sent > 0:
        board.add("fedllm_site_sent_payload_bytes_total", sent)
    match reply:
        case TrainReport():
            _trained(board, reply)
        case EvaluateReport() if "fedllm_site_heldout_loss" in board.families:
            board.set("fedllm_site_heldout_loss", reply.score.loss)


def _trained(board: Board, report: TrainReport) -> None:
    seconds = report.phases.get("train", 0.0)
    board.set("fedllm_site_round", report.round)
    board.add("fedllm_site_trained_steps_total", report.num_steps)
    board.add("fedllm_site_trained_tokens_total", report.num_tokens)
    board.add("fedllm_site_training_seconds_total", seconds)
    if seconds > 0:
        board.set("fedllm_site_tokens_per_second", report.num_tokens / seconds)
    if report.loss is not None and "fedllm_site_train_loss" in board.families:
        board.set("fedllm_site_train_loss", report.loss)


def _memory(board: Board) -> None:
    """Note what this process took; torch is asked only where the work has loaded it and used a GPU."""
    board.set("fedllm_site_memory_peak_bytes", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        board.set("fedllm_site_gpu_memory_peak_bytes", torch.cuda.max_memory_reserved())
        board.set("fedllm_site_gpu_memory_total_bytes", torch.cuda.mem_get_info()[1])
