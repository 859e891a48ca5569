"""The ClientApp: Flower's entry point at a site.

Every message becomes one call of :func:`client_app.tasks.perform`. Errors of ours go back as words, others as their class
only, since a stack trace can hold data; the whole trace stays in the site's own log.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from flwr.app import Context
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp

from fedllm.errors import FedLLMError, TransportError
from fedllm.logs import set_up_logging
from fedllm.messages import Failure, Instruction
from fedllm.records import from_records, to_records

if TYPE_CHECKING:
    from client_app.tasks import Answer
    from client_app.workplace import Workplace

log = logging.getLogger(__name__)

app = ClientApp()


def _answer(message: FlowerMessage, context: Context) -> FlowerMessage:
    set_up_logging()
    site = ""
    try:
        instruction, envelope = from_records(message.content, "an instruction")
        if not isinstance(instruction, Instruction):
            raise TransportError(f"expected an instruction, found {instruction.kind!r}")
        open_workplace, perform = _heavy()
        workplace = open_workplace(context.node_config, instruction)
        site = workplace.site
        reply, back = perform(instruction, envelope, workplace)
        return FlowerMessage(to_records(reply, back), reply_to=message)
    except FedLLMError as error:
        log.warning("%s cannot do what was asked: %s", site or "site", error)
        failure = Failure(site=site, error=type(error).__name__, reason=str(error)[:4000])
    except Exception as error:
        log.exception("%s failed", site or "site")
        reason = "an unexpected error; the site's log has the details"
        failure = Failure(site=site, error=type(error).__name__, reason=reason)
    return FlowerMessage(to_records(failure), reply_to=message)


def _heavy() -> tuple[Callable[..., Workplace], Callable[..., Answer]]:
    """Import what brings torch along, at the first message: Flower's simulation loads this module in the server too."""
    with warnings.catch_warnings():
        # bitsandbytes 0.50 imports a part of torch 2.13 that calls what torch deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        from client_app.tasks import perform
        from client_app.workplace import open_workplace
    return open_workplace, perform


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
