"""Builds ``report.html`` from a run's files alone: one self-contained page, the same bytes from the same files.

The page has no script and asks for nothing from anywhere; a content security policy in it holds that even if something
that a site sent were to get past the escaping.
"""

from __future__ import annotations

import logging
from pathlib import Path

from fedllm.errors import CheckpointError, explain
from fedllm.files import atomic_write
from fedllm.manifest import Manifest
from fedllm.runs import RunFolder
from server_app.events import read_events
from server_app.report.appendix import glossary, provenance, settings
from server_app.report.comparison import answers, comparison
from server_app.report.course import cost, participation
from server_app.report.curves import curves
from server_app.report.markup import Markup, el, join
from server_app.report.material import Material
from server_app.report.style import STYLE
from server_app.report.summary import headline, top
from server_app.results import Results

log = logging.getLogger(__name__)

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def build_report(folder: RunFolder) -> Path:
    """Write a run's report, whether the run is finished or not.

    Returns:
        The report's path.

    Raises:
        CheckpointError: The run's metrics cannot be read, or the report cannot be written.
    """
    page = render(Material(folder.name, _manifest(folder), Results.of(read_events(folder.metrics))))
    try:
        atomic_write(folder.report, page)
    except OSError as error:
        raise CheckpointError(explain("a report cannot be written", found=error, where=folder.report)) from error
    return folder.report


def render(material: Material) -> str:
    """Return the whole page."""
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("meta", name="description", content=headline(material)),
        el("title", f"{material.name} - fedllm run report"),
        Markup(f"<style>{STYLE}</style>"),
    )
    parts = (top, comparison, curves, answers, cost, participation, settings, provenance)
    body = el("main", *(part(material) for part in parts), glossary(), _footer(material))
    return join([Markup("<!doctype html>\n"), el("html", head, el("body", body), lang="en"), Markup("\n")])


def _footer(material: Material) -> Markup:
    release = material.manifest.versions.get("fedllm", "") if material.manifest else ""
    made = f"Made by fedllm {release} from manifest.json and metrics.jsonl; "
    return el("footer", made, el("code", "fedllm report"), " makes it anew.")


def _manifest(folder: RunFolder) -> Manifest | None:
    if not folder.manifest.exists():
        return None
    try:
        return Manifest.read(folder.manifest)
    except CheckpointError as error:
        log.warning("the report lacks the manifest: %s", error)
        return None
