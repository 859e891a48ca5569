"""The figures of a run, one more way to read its events: what each is called and what it counts.

Counters cover the whole run as ``metrics.jsonl`` records it, the part before a resume included, so both say the same.
"""

from __future__ import annotations

from fedllm import errors
from fedllm.errors import FedLLMError
from fedllm.observability.board import Family
from server_app.events import LATE, SILENT

MAX_SITES = 100
"""Sites that have figures of their own; later ones are counted together."""

OTHER = "Other"
"""Stands for reasons that are not known."""

REASONS = frozenset(
    {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, FedLLMError)}
    | {"FlowerError", LATE, SILENT, OTHER}
)
"""Every value of the label ``reason``. What a site calls its error is not trusted to be among them."""

FAMILIES = (
    Family("fedllm_run_info", "gauge", "What runs; always 1.", ("strategy", "adapter", "version")),
    Family("fedllm_rounds_planned", "gauge", "Rounds that the run is to have."),
    Family("fedllm_round", "gauge", "The last round that moved the global adapter."),
    Family(
        "fedllm_rounds_total",
        "counter",
        "Attempts at rounds, by outcome: done, or in_vain where nothing changed.",
        ("outcome",),
    ),
    Family("fedllm_participants", "gauge", "Sites whose updates were usable in the last attempt at a round."),
    Family("fedllm_updates_used_total", "counter", "Updates that were folded into the global adapter."),
    Family("fedllm_updates_rejected_total", "counter", "Updates asked for and not used, by reason.", ("reason",)),
    Family("fedllm_site_updates_total", "counter", "Updates by site and outcome: used, rejected.", ("site", "outcome")),
    Family("fedllm_sites_left_out_total", "counter", "Sites that joined and cannot take part."),
    Family("fedllm_train_loss", "gauge", "Mean training loss of the last round's participants, in nats."),
    Family(
        "fedllm_heldout_loss",
        "gauge",
        "Loss of the global adapter on held-out text, in nats: all sites' tokens, the worst site's, the server's own.",
        ("text",),
    ),
    Family("fedllm_heldout_accuracy_ratio", "gauge", "Share of the sites' held-out tokens that are predicted."),
    Family("fedllm_base_heldout_loss", "gauge", "Held-out loss before training, in nats."),
    Family("fedllm_best_heldout_loss", "gauge", "Lowest held-out loss of any round, in nats."),
    Family("fedllm_update_norm", "gauge", "Euclidean norm of the last round's aggregate."),
    Family(
        "fedllm_discarded_energy_ratio", "gauge", "Share of the last mean product that did not fit into the adapter."
    ),
    Family(
        "fedllm_payload_bytes_total", "counter", "Payload bytes from sites (up) and to sites (down).", ("direction",)
    ),
    Family("fedllm_trained_tokens_total", "counter", "Target tokens that used updates were trained on."),
    Family("fedllm_trained_steps_total", "counter", "Optimizer steps of used updates, at all sites."),
    Family("fedllm_round_seconds", "summary", "Duration of attempts at rounds."),
    Family("fedllm_round_phase_seconds", "summary", "Duration of the phases of attempts at rounds.", ("phase",)),
    Family("fedllm_evaluation_seconds", "summary", "Duration of evaluations."),
    Family("fedllm_last_event_timestamp_seconds", "gauge", "When something was last recorded, in seconds since 1970."),
    Family("fedllm_run_ended", "gauge", "1 once the run has ended, by status: finished, failed, stopped.", ("status",)),
    Family("fedllm_spool_bytes", "gauge", "Bytes of payloads that lie in the run's spool."),
    Family("fedllm_spool_files", "gauge", "Files of payloads that lie in the run's spool."),
)
"""Every figure of a run. All of them carry the label ``run`` besides."""
