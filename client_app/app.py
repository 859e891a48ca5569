"""The ClientApp: Flower's entry point at a site.

Every message passes :func:`client_app.gate.attend` and, where the data owner allows it, becomes one call of
:func:`client_app.tasks.perform`. Errors of ours go back as words, others as their class
only, since a stack trace can hold data; the whole trace stays in the site's own log.
"""

from __future__ import annotations

import logging
import warnings
from contextlib import ExitStack

from flwr.app import Context
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp

from client_app.gate import attend, reason_of, write_down_unreadable
from client_app.workplace import Workplace, open_workplace
from fedllm.errors import FedLLMError, PolicyError, TransportError
from fedllm.logs import about, set_up_logging
from fedllm.messages import AnyMessage, Failure, Instruction
from fedllm.records import from_records, to_records
from fedllm.wire.transport import Envelope

log = logging.getLogger(__name__)

app = ClientApp()


def _answer(message: FlowerMessage, context: Context) -> FlowerMessage:
    set_up_logging()
    with ExitStack() as saying:
        return _said(message, context, saying)


def _said(message: FlowerMessage, context: Context, saying: ExitStack) -> FlowerMessage:
    """Answer; what is logged meanwhile says what it is about as soon as that is known."""
    site = ""
    try:
        instruction, envelope = _read(message, context)
        saying.enter_context(about(run=instruction.run, round=getattr(instruction, "round", None)))
        workplace = open_workplace(context.node_config, instruction)
        site = workplace.site
        saying.enter_context(about(node=site))
        reply, back = attend(instruction, envelope, workplace, _perform)
        return FlowerMessage(to_records(reply, back), reply_to=message)
    except FedLLMError as error:
        log.warning("%s cannot do what was asked: %s", site or "site", error)
        failure = _failure(site, error)
    except Exception as error:
        log.exception("%s failed", site or "site")
        failure = _failure(site, error)
    return FlowerMessage(to_records(failure), reply_to=message)


def _read(message: FlowerMessage, context: Context) -> tuple[Instruction, Envelope]:
    try:
        instruction, envelope = from_records(message.content, "an instruction")
        if not isinstance(instruction, Instruction):
            raise TransportError(f"expected an instruction, found {instruction.kind!r}")
    except TransportError as error:
        write_down_unreadable(context.node_config, error)
        raise
    return instruction, envelope


def _failure(site: str, error: Exception) -> Failure:
    retry_s = error.retry_s if isinstance(error, PolicyError) else 0.0
    return Failure(site=site, error=type(error).__name__, reason=reason_of(error), retry_s=retry_s)


def _perform(instruction: AnyMessage, envelope: Envelope, workplace: Workplace) -> tuple[AnyMessage, Envelope | None]:
    """Do the work. What brings torch along is imported here, when something is to be done: Flower's simulation loads this
    module in the server too, and a refusal needs no torch.
    """
    with warnings.catch_warnings():
        # bitsandbytes 0.50 imports a part of torch 2.13 that calls what torch deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        from client_app.tasks import perform
    return perform(instruction, envelope, workplace)


@app.query()
def query(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Say what the site holds."""
    return _answer(message, context)


@app.train()
def train(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Train for one round."""
    return _answer(message, context)


@app.train("local_only")
def train_local_only(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Train alone, for comparison."""
    return _answer(message, context)


@app.train("personalise")
def train_personalise(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Make the site's own adapter."""
    return _answer(message, context)


@app.evaluate()
def evaluate(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Evaluate on the site's hold-out."""
    return _answer(message, context)
