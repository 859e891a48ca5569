"""A run as it could have been: topics as sites, smooth curves with seeded noise, a bad reply, a failed attempt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from fedllm.config import RunConfig
from fedllm.rng import generator
from fedllm.runs import Event, Manifest, RunFolder, SiteCounts
from server_app.recorder import Recorder

SITES = {
    "history": 3.41,
    "politics": 3.97,
    "science": 3.62,
    "sports": 3.18,
    "trivia": 4.05,
    "food": 3.30,
    "movies": 3.55,
}
START = 1_790_000_000.0
BASE_ANSWER = "Gravity is a force. It is a force that is a force of the earth and the moon."
FEDERATED_ANSWER = "Every mass attracts every other mass with a force that falls with the square of their distance."


def sample_events(
    num_rounds: int = 6, sites: Mapping[str, float] = SITES, *, status: str = "finished", reason: str = ""
) -> list[Event]:
    """Return a run's events; ``status`` may be empty for a run without end."""
    events: list[Event] = [_left_out(), _evaluation(0, sites)]
    for round_ in range(1, num_rounds + 1):
        if round_ == 2:
            events.append(_round(round_, dict(list(sites.items())[:1]), "attempt", "no reply before the round closed"))
        events += [_round(round_, sites), _evaluation(round_, sites)]
    if status == "finished":
        events += [_local_only(sites), _answer(sites)]
    best = num_rounds or None
    ended = {"event": "end", "status": status, "reason": reason, "best_round": best}
    events += [ended] if status else []
    return [{"time": START + 40 * number, **event} for number, event in enumerate(events)]


def write_sample(home: Path, name: str = "sample", config: RunConfig | None = None, **kind: object) -> RunFolder:
    """Make a run's folder with a manifest and metrics that a recorder wrote."""
    config = config or RunConfig(num_rounds=6)
    folder = RunFolder.create(home, name)
    sites = kind.get("sites", SITES)
    assert isinstance(sites, Mapping)
    counts = {site: SiteCounts(train_examples=90 + 7 * n, train_tokens=2100 + 111 * n) for n, site in enumerate(sites)}
    fields = {"created": "2026-09-21T14:13:20+00:00", "versions": {"fedllm": "0.1.0", "flwr": "1.41.0"}}
    manifest = Manifest.of(name, config, base_fingerprint="5f" * 32, num_parameters=460_800, sites=counts, **fields)
    manifest.write(folder.manifest)
    with Recorder(folder) as recorder:
        for event in sample_events(**kind):  # type: ignore[arg-type]
            recorder.record(event)
    return folder


def _evaluation(round_: int, sites: Mapping[str, float]) -> Event:
    noise = generator(1, round_, purpose="heldout").normal(0, 0.02, len(sites))
    parts = {
        site: _measured(start - 0.75 * (1 - math.exp(-round_ / 2.5)) + (noise[n] if round_ else 0), n)
        for n, (site, start) in enumerate(sites.items())
    }
    worst = max(parts, key=lambda site: parts[site]["loss"])
    total = sum(part["num_tokens"] for part in parts.values())
    return {
        "event": "evaluation",
        "round": round_,
        "sites": parts,
        "loss": sum(part["loss"] * part["num_tokens"] for part in parts.values()) / total,
        "accuracy": sum(part["accuracy"] * part["num_tokens"] for part in parts.values()) / total,
        "worst_site": worst,
        "worst_loss": parts[worst]["loss"],
        "central": None,
        "bytes_down": 1_860_000 * len(sites),
        "seconds": 9.1 + 0.1 * round_,
    }


def _measured(loss: float, n: int) -> dict[str, float]:
    return {"loss": loss, "accuracy": 0.62 - loss / 14, "num_tokens": 400 + 31 * n, "num_examples": 24 + n}


def _round(round_: int, sites: Mapping[str, float], kind: str = "round", why: str = "") -> Event:
    rejected = [{"site": "trivia", "reason": "NonFiniteError: tensor 'q_proj.lora_A.weight' holds NaN or infinity."}]
    rejected = (
        rejected if round_ == 3 else [{"site": site, "reason": why} for site in ("food", "movies")] if why else []
    )
    used = [site for site in sites if site not in {part["site"] for part in rejected}]
    speed = generator(2, round_, purpose="seconds").uniform(0.8, 1.2, len(sites))
    return {
        "event": kind,
        "round": round_,
        "attempt": 2 if round_ == 2 and kind == "round" else 1,
        "participants": sorted(used),
        "rejected": rejected,
        "train_loss": 3.1 * math.exp(-round_ / 9),
        "sites": {
            site: {
                "loss": sites[site] * math.exp(-round_ / 9),
                "weight": 90 + 7 * n,
                "num_tokens": 2100 + 111 * n,
                "num_steps": 10,
                "seconds": 28 * speed[n],
            }
            for n, site in enumerate(used)
        },
        "update_norm": 1.9 / round_,
        "bytes_up": 1_843_200 * len(used) + 900,
        "bytes_down": 1_860_000 * len(sites),
        "phases": {"select": 0.01, "broadcast": 1.3 + 0.1 * round_, "train": 31 * max(speed), "aggregate": 0.8},
        "seconds": 2.5 + 31 * max(speed),
    }


def _left_out() -> Event:
    reason = (
        "AgreementError: site 'weather' does not agree; quantization: the federation has nf4+double, the site has none."
    )
    return {"event": "left_out", "site": "weather", "reason": reason}


def _local_only(sites: Mapping[str, float]) -> Event:
    shifts = generator(3, purpose="local").uniform(-0.68, -0.35, len(sites))
    shifts[len(sites) // 4] = -0.8
    parts = {site: _measured(sites[site] + shifts[n], n) for n, site in enumerate(sites)}
    total = sum(part["num_tokens"] for part in parts.values())
    loss = sum(part["loss"] * part["num_tokens"] for part in parts.values()) / total
    return {"event": "local_only", "sites": parts, "loss": loss, "seconds": 190.0}


def _answer(sites: Mapping[str, float]) -> Event:
    prompt = "What is the law of gravity?"
    return {
        "event": "answer",
        "prompt": prompt,
        "site": next(iter(sites)),
        "base": BASE_ANSWER,
        "federated": FEDERATED_ANSWER,
    }
