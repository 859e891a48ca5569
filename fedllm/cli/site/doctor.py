"""``fedllm site doctor``: does this machine have what the federation needs, and if not, what to do."""

from __future__ import annotations

import argparse
import shutil
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.cli.command import Command, add_json, print_json
from fedllm.config import RunConfig, Scalar, read_run_config
from fedllm.errors import ConfigError, explain
from fedllm.text import clean, pad, wrap

if TYPE_CHECKING:
    from client_app.doctor.finding import Finding

_STATUS_COLUMNS, _CHECK_COLUMNS = 9, 14


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--site", default="site.toml", metavar="FILE", help="the site's file (default: site.toml)")
    text = "address that sites connect to (default: the kit's, else transport.address of the site's file)"
    parser.add_argument("--server", default="", metavar="HOST:PORT", help=text)
    text = "the operator's run config in TOML, for the base and the sizes to expect (default: the defaults)"
    parser.add_argument("--run-config", default="", metavar="FILE", help=text)
    text = "the federation's fingerprint of the base, from the operator, to compare with"
    parser.add_argument("--base-fingerprint", default="", metavar="HEX", help=text)
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    from client_app.doctor.finding import Status, worst

    findings: list[Finding] = []
    for finding in _findings(arguments):
        findings.append(finding)
        if not arguments.json:
            print("\n".join(_lines(finding)), flush=True)
    if arguments.json:
        print_json({"status": worst(findings), "findings": [asdict(finding) for finding in findings]})
    else:
        print(_summary(findings))
    return int(worst(findings) is Status.FAILURE)


def _findings(arguments: argparse.Namespace) -> Iterator[Finding]:
    from client_app.doctor.case import Case
    from client_app.doctor.examine import examine
    from client_app.doctor.finding import failure, ok
    from client_app.site import load_site_config
    from fedllm.provision.kit import KIT, read_kit

    path = Path(arguments.site)
    try:
        owner = load_site_config(path)
        run = _run_config(arguments.run_config)
        known_server = read_kit(owner.home).server if (owner.home / KIT).is_file() else ""
    except ConfigError as error:
        yield failure("site file", str(error), "Correct it and run the doctor again; nothing else was looked at.")
        return
    yield ok("site file", f"{path} is in order; the site is {owner.site.name!r}", site=owner.site.name)
    server = arguments.server or known_server or owner.transport.address
    yield from examine(Case(owner, run, server, arguments.base_fingerprint))


def _run_config(path: str) -> RunConfig:
    if not path:
        return RunConfig()
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(explain("the run config cannot be read", found=error, where=path)) from error
    return read_run_config(dict(_flat(values)))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Scalar]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _lines(finding: Finding) -> Iterator[str]:
    """Lay a finding out for a terminal; what is to be done stands on lines of its own."""
    margin = _STATUS_COLUMNS + _CHECK_COLUMNS
    columns = max(40, shutil.get_terminal_size((110, 24)).columns - margin - 1)
    head = pad(finding.status, _STATUS_COLUMNS) + pad(finding.check, _CHECK_COLUMNS)
    fix = [f"-> {finding.fix}"] if finding.fix else []
    for text in [finding.message, *fix]:
        for line in wrap(clean(text), columns):
            yield (pad(head, margin) + line).rstrip()
            head = ""


def _summary(findings: Sequence[Finding]) -> str:
    counts = Counter(str(finding.status) for finding in findings)
    failures, warnings = counts["failure"], counts["warning"]
    verdict = "this site is not ready" if failures else "this site is ready"
    plural = "" if failures == 1 else "s", "" if warnings == 1 else "s"
    return f"\n{failures} failure{plural[0]}, {warnings} warning{plural[1]}, {counts['ok']} ok: {verdict}"


COMMAND = Command("doctor", "check this machine before joining, and say what to do", _configure, _run)
