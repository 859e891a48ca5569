"""The figures of a site: what each is called and what it counts.

They are for the site's own admin. Numbers of training are those of the answers as they left (rounded, and without losses
where the data owner does not share them), so nobody who reads the figures learns more than the server did.
"""

from __future__ import annotations

from typing import get_args

from client_app.policy.settings import SharingSection
from fedllm.messages import AnyMessage, Instruction
from fedllm.observability.board import Family

KINDS = frozenset(
    str(kind.model_fields["kind"].default)
    for kind in get_args(get_args(AnyMessage)[0])
    if issubclass(kind, Instruction)
)
"""Every value of the label ``kind``."""

OUTCOMES = ("done", "refused", "failed")
"""Every value of the label ``outcome``: a refusal is the data owner's, a failure anything else."""

WORK = (
    Family("fedllm_site_tasks_total", "counter", "Messages of the server, by kind and outcome.", ("kind", "outcome")),
    Family("fedllm_site_task_seconds", "summary", "Duration of the work that a message asked for.", ("kind",)),
    Family("fedllm_site_last_task_timestamp_seconds", "gauge", "When a message was last answered, since 1970."),
    Family("fedllm_site_round", "gauge", "The last round that the site trained in."),
    Family("fedllm_site_trained_steps_total", "counter", "Optimizer steps."),
    Family("fedllm_site_trained_tokens_total", "counter", "Target tokens trained on."),
    Family("fedllm_site_training_seconds_total", "counter", "Time in the training loop, without transfers."),
    Family("fedllm_site_tokens_per_second", "gauge", "Target tokens a second of the last round's training loop."),
    Family("fedllm_site_sent_payload_bytes_total", "counter", "Bytes of updates that left, compressed."),
    Family("fedllm_site_memory_peak_bytes", "gauge", "Largest resident set of the last message's process."),
    Family("fedllm_site_gpu_memory_peak_bytes", "gauge", "Most GPU memory that the last message's process reserved."),
    Family("fedllm_site_gpu_memory_total_bytes", "gauge", "Memory of the GPU that the site works on."),
)
"""Of the work, kept by the ClientApp."""

LOSSES = (
    Family("fedllm_site_train_loss", "gauge", "Mean training loss of the last round, in nats."),
    Family("fedllm_site_heldout_loss", "gauge", "Loss of the last evaluated adapter on the site's hold-out, in nats."),
)
"""Of the work too, where the data owner shares losses (`sharing.losses`)."""

SERVICE = (
    Family("fedllm_site_info", "gauge", "What serves the site; always 1.", ("version",)),
    Family("fedllm_site_connected", "gauge", "1 while the site is connected to the server, else 0."),
    Family("fedllm_site_started_timestamp_seconds", "gauge", "When the site's service began, since 1970."),
    Family("fedllm_site_last_message_timestamp_seconds", "gauge", "When the server last sent a message, since 1970."),
    Family("fedllm_site_restarts_total", "counter", "Times that the SuperNode had to be started again."),
)
"""Of `fedllm site start`."""


def work_families(sharing: SharingSection) -> tuple[Family, ...]:
    """Return what may be counted of the work."""
    return (*WORK, *LOSSES) if sharing.losses else WORK
