"""One round's replies of a stock app: read, checked against what was sent, and turned into deltas."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict

from fedllm.errors import UpdateError, explain
from fedllm.lora.alignment import aligned
from fedllm.update import Arrays, Layout
from fedllm.work import ClientWork
from server_app.stock import records
from strategies.slots import OptimizerState

log = logging.getLogger("flwr.fedllm")


@dataclass(frozen=True)
class Standing:
    """Where a federation stands in the middle of a round.

    Attributes:
        round: The round, from 1.
        layout: All arrays.
        params: What was sent.
        work: What the sites were asked to do.
        num_nodes: Nodes that are connected, asked or not.
        optimizer: What the server optimizer remembers of the rounds before.
    """

    round: int
    layout: Layout
    params: Arrays
    work: ClientWork
    num_nodes: int
    optimizer: OptimizerState


@dataclass(frozen=True)
class Trained:
    """A usable reply: the delta of what was trained, its weight, and what the site measured."""

    delta: Arrays
    weight: float
    metrics: MetricRecord


def usable_replies(standing: Standing, replies: Iterable[Message], weight_key: str) -> dict[str, Trained]:
    """Return the replies that can be used, by the name of their node; the others are named in the log.

    Args:
        standing: The round.
        replies: What came back.
        weight_key: Metric that holds a reply's weight, empty where all count alike.
    """
    usable = {}
    for reply in replies:
        node = reply.metadata.src_node_id
        try:
            usable[str(node)] = _trained(standing, content_of(reply), weight_key)
        except UpdateError as error:
            log.warning("round %d: rejected the update of node %d: %s", standing.round, node, error)
    return usable


def content_of(reply: Message) -> RecordDict:
    """Return what a reply holds.

    Raises:
        UpdateError: It is an error.
    """
    if reply.has_error():
        raise UpdateError(explain("the site failed", found=reply.error.reason))
    return reply.content


def _trained(standing: Standing, content: RecordDict, weight_key: str) -> Trained:
    """Read one reply.

    Raises:
        UpdateError: It cannot be used.
    """
    metrics = records.only_metrics(content)
    weight = records.weight_of(metrics, weight_key)
    arrays = records.to_arrays(records.only_arrays(content), standing.layout, "a reply")
    sent = standing.work.sent(standing.layout)
    _check_complete(arrays, sent)
    _check_frozen(arrays, standing.params, sent)
    if standing.work.alignment:
        arrays = aligned(arrays, standing.params, standing.work.alignment, standing.round)
    return Trained({name: arrays[name] - standing.params[name] for name in sent.names}, weight, metrics)


def _check_complete(arrays: Arrays, sent: Layout) -> None:
    if missing := [name for name in sent.names if name not in arrays]:
        raise UpdateError(explain("a reply lacks arrays that were to be trained", found=missing[:3]))


def _check_frozen(arrays: Arrays, params: Arrays, sent: Layout) -> None:
    changed = [name for name in arrays if name not in sent and not np.array_equal(arrays[name], params[name])]
    if changed:
        fix = "Train only the arrays named in the message's config under 'trainable'."
        raise UpdateError(explain("a site trained what this round leaves as it is", found=changed[:3], fix=fix))
