"""The end of the report: settings, provenance, and what the words mean."""

from __future__ import annotations

import json
from collections.abc import Iterable

from fedllm.config import RunConfig, describe
from fedllm.manifest import Manifest
from server_app.report.figures import section
from server_app.report.markup import Markup, el
from server_app.report.material import Material

_TERMS = {
    "Held-out loss": "mean cross-entropy in nats for each predicted token of text that nobody trained on; over all sites, "
    "weighted by tokens.",
    "Perplexity": "e to the power of the loss: among how many equally likely tokens the model is as unsure.",
    "Accuracy": "share of tokens that the model ranks first.",
    "Base": "the model before any training.",
    "Local only": "each site trained alone from the same start for as many steps as in the federation.",
    "Federated": "the global adapter after the last evaluated round.",
    "Update norm": "Euclidean length of the aggregated update.",
    "Energy that did not fit": "share of the squared length of the sites' mean product which the next adapter lacks, where "
    "products are averaged; its root is the round's relative error.",
}


def settings(material: Material) -> Markup:
    """Return the run's config: what differs from the defaults in view, the rest behind a click."""
    if material.manifest is None:
        return Markup()
    described = {key: (default, meaning) for key, default, meaning in describe(RunConfig)}
    config = material.manifest.config
    changed = [key for key, value in config.items() if key not in described or described[key][0] != value]
    rows = {key: _setting_row(key, config[key], *described.get(key, ("", ""))) for key in config}
    head = ["setting", "value", "default", "meaning"]
    everything = el("details", el("summary", f"All {len(rows)} settings"), _table(head, rows.values()))
    own = _table(head, (rows[key] for key in changed)) if changed else ""
    return section("Settings", "" if changed else "Every setting has its default.", own, everything, long=True)


def _setting_row(key: str, value: object, default: object, meaning: str) -> Markup:
    cells = (el("code", key), el("code", _written(value)), el("code", _written(default)), meaning)
    return el("tr", *(el("td", cell) for cell in cells))


def _written(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _table(head: list[str], rows: Iterable[Markup]) -> Markup:
    names = el("thead", el("tr", *(el("th", name, scope="col") for name in head)))
    return el("div", el("table", names, el("tbody", *rows)), class_="scroll")


def provenance(material: Material) -> Markup:
    """Return what the result depends on besides config: software, base, source revision, amounts of data."""
    manifest = material.manifest
    if manifest is None:
        return section("Provenance", "The run's manifest is missing or cannot be read.")
    facts = _facts(manifest)
    rows = [el("tr", el("td", name), el("td", el("code", value))) for name, value in facts.items() if value]
    parts = [el("details", el("summary", "Manifest"), _table(["", ""], rows))]
    if manifest.sites:
        parts.append(el("details", el("summary", "Amounts of data by site"), _counts(manifest)))
    return section("Provenance", "What the result depends on, for repeating it.", *parts, long=True)


def _facts(manifest: Manifest) -> dict[str, str]:
    return {
        "made": manifest.created,
        "base fingerprint": manifest.base_fingerprint,
        "trained parameters": f"{manifest.num_parameters:,}" if manifest.num_parameters else "",
        "source revision": manifest.git_revision or "",
        "Flower run" + ("s" if len(manifest.flower_run_ids) > 1 else ""): ", ".join(map(str, manifest.flower_run_ids)),
        "seeds": ", ".join(f"{purpose} {seed}" for purpose, seed in manifest.seeds.items()),
        **{f"{name} release": release for name, release in manifest.versions.items()},
    }


def _counts(manifest: Manifest) -> Markup:
    head = ["site", "training examples", "training tokens", "held-out examples", "held-out tokens"]
    rows = []
    for site, counts in manifest.sites.items():
        amounts = (counts.train_examples, counts.train_tokens, counts.holdout_examples, counts.holdout_tokens)
        rows.append(el("tr", el("td", site), *(el("td", f"{amount:,}") for amount in amounts)))
    return _table(head, rows)


def glossary() -> Markup:
    """Return what the report's words mean."""
    rows = [el("tr", el("td", el("b", term)), el("td", meaning)) for term, meaning in _TERMS.items()]
    details = el("details", el("summary", "What the terms of this report mean"), el("table", el("tbody", *rows)))
    return section("Words", "", details)
