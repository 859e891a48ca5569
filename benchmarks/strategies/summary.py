"""Rows of several seeds as one, and all of them as a page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]

REFERENCE = "fedavg"
LOSS = "heldout_loss"


def summarise(rows: Mapping[int, Row]) -> Row:
    """Return the means over seeds of every number, and the rows by seed.

    A number that some row lacks is left out as `None`.
    """
    numbers = [key for key, value in next(iter(rows.values())).items() if not isinstance(value, dict)]
    return {**{key: _mean([row[key] for row in rows.values()]) for key in numbers}, "seeds": dict(rows)}


def compare(results: Mapping[str, Row]) -> None:
    """Add to each result how its loss differs from FedAvg's, seed by seed: mean, lowest, highest.

    All strategies see the same sites, text and batches with the same seed, so these differences say more than the losses.
    """
    reference = results.get(REFERENCE, {"seeds": {}})["seeds"]
    for result in results.values():
        paired = [row[LOSS] - reference[seed][LOSS] for seed, row in result["seeds"].items() if seed in reference]
        result["loss_over_fedavg"] = _mean(paired) if paired else None
        result["loss_over_fedavg_range"] = [min(paired), max(paired)] if paired else None


def page(outcome: Mapping[str, Any], command: str) -> str:
    """Return the result as a Markdown page.

    Args:
        outcome: What the benchmark printed.
        command: How it was called.
    """
    ranked = sorted(outcome["strategies"].items(), key=lambda item: item[1][LOSS])
    bounds = [(name.replace("_", " "), outcome[name]) for name in ("local_only", "centralised") if outcome.get(name)]
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    lines += [_line(f"`{name}`", result) for name, result in ranked]
    lines += [_line(f"*{name}*", result) for name, result in bounds]
    return _PAGE.format(
        command=command,
        num_sites=outcome["num_sites"],
        num_rounds=outcome["num_rounds"],
        local_steps=outcome["local_steps"],
        personal_steps=outcome["personal_steps"],
        seeds=", ".join(map(str, outcome["seeds"])),
        base_loss=f"{outcome['base_loss']:.3f}",
        rows="\n".join(lines),
        left_out=_left_out(outcome),
        machine=_described(outcome["machine"]),
    )


def _line(name: str, result: Row) -> str:
    low, high = result.get("loss_over_fedavg_range") or (None, None)
    cells = [
        name,
        _fixed(result[LOSS]),
        f"{low:+.3f} … {high:+.3f}" if low is not None else "",
        _fixed(result["heldout_loss_worst_site"]),
        _fixed(result.get("heldout_loss_global")),
        _fixed(result.get("heldout_loss_personalised")),
        *(
            _fixed(value / 1e6 if value is not None else None, 2)
            for value in map(result.get, ("bytes_up", "bytes_down"))
        ),
        _fixed(result.get("server_s"), 2),
        _fixed(result["server_peak_rss_bytes"] / 1e6, 0) if result.get("server_peak_rss_bytes") else "",
        f"{result['exactness_error']:.0e}" if result.get("exactness_error") is not None else "",
    ]
    return f"| {' | '.join(cells)} |"


def _described(machine: Mapping[str, Any]) -> str:
    releases = ", ".join(f"{name} {release}" for name, release in machine["versions"].items())
    return f"{machine['processor']}, {machine['cores']} cores; {releases}"


def _left_out(outcome: Mapping[str, Any]) -> str:
    reasons = {**outcome["refused"], **outcome["failed"]}
    return "".join(f"\n- `{name}` is not in the table: {reason}" for name, reason in sorted(reasons.items()))


def _fixed(value: float | None, decimals: int = 3) -> str:
    return "" if value is None else f"{value:.{decimals}f}"


def _mean(values: list[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return statistics.fmean(given) if len(given) == len(values) else None


_COLUMNS = (
    "strategy",
    "held-out loss",
    "against FedAvg, seed by seed",
    "worst site",
    "global adapter",
    "personalised",
    "MB up",
    "MB down",
    "server s",
    "server MB",
    "exactness",
)

_PAGE = """# Strategies beside each other

`{command}`: {num_sites} sites with topics of their own, SmolLM2-135M-Instruct in NF4, LoRA rank 8, {num_rounds} rounds of
{local_steps} steps; seeds {seeds}. The loss of the base is {base_loss}. Means over seeds; losses in nats per held-out
token. Measured on {machine}.

![Held-out losses by strategy](strategies.svg)

{rows}

- **Held-out loss**: of what a site applies after the last round, over all sites' held-out tokens; for strategies that keep
  tensors at the sites that is each site's own adapter. **Worst site**: the same at the site where it is highest. **Global
  adapter**: of what the federation has in common. **Personalised**: after {personal_steps} more steps at each site.
- **Bounds**: *local only* is each site by itself, for the steps that it takes in the federation. *centralised* has all
  text in one place, as many steps, and in each the batches of all sites together.
- **Bytes** are payloads of the whole run over all sites, uncompressed float32, states for evaluations included.
  **Server**: seconds of choosing, encoding and aggregating in all rounds, without waiting for sites; and the most memory
  that its process held.
- **Exactness**: how far what the sites apply after the last round is from the weighted mean of what they applied at the
  end of their training, relative to it, in float64 over all layers. Adaptive servers and robust rules do not mean to be
  that mean; empty where sites apply adapters of their own, or prompts, or do not all train in the last round. `fedex`,
  `flora` and `florist` err by what no longer fits into side factors of rank `adapter.side_rank` (64 here, where four sites'
  products of three rounds have up to 96 components and more); every round's event says how much that is.
- Runs are short: read differences that keep their sign over all seeds, and no others.{left_out}
"""
