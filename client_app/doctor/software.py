"""Python and packages, against what the project asks for."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from client_app.doctor.finding import Finding, failure, ok
from fedllm.provenance import own_project

EXTRA = "site"
"""The extra of the project that a site installs."""


def examine_python(asked: str, found: str = "") -> Finding:
    """Compare the interpreter with a specifier such as ``>=3.11,<3.14``."""
    found = found or platform.python_version()
    if found in SpecifierSet(asked, prereleases=True):
        return ok("python", f"{found}, as asked for ({asked})", version=found)
    return failure(
        "python", f"{found}; the project needs {asked}", "Install another Python and make the environment anew."
    )


def examine_packages(requirements: Iterable[Requirement]) -> Iterator[Finding]:
    """Compare installed packages with requirements: one line for all that are right, one for each that is not."""
    right: dict[str, str] = {}
    for requirement in requirements:
        found = _installed(requirement.name)
        if found is not None and requirement.specifier.contains(found, prereleases=True):
            right[requirement.name] = found
            continue
        asked = f"{requirement.name}{requirement.specifier}"
        message = f"{asked} is needed; {'it is not installed' if found is None else f'{found} is installed'}"
        fix = f"Install what a site needs: pip install 'fedllm[{EXTRA}]', or pip install '{asked}'."
        yield failure("packages", message, fix, package=requirement.name, version=found or "")
    if right:
        shown = ", ".join(f"{name} {right[name]}" for name in ("flwr", "torch", "bitsandbytes") if name in right)
        yield ok("packages", f"{len(right)} as asked for{f', among them {shown}' if shown else ''}", **right)


def examine_software() -> Iterator[Finding]:
    """Compare this environment with what the copy of fedllm that runs asks for."""
    python, requirements = project_requirements()
    yield examine_python(python)
    yield from examine_packages(requirements)


def project_requirements() -> tuple[str, list[Requirement]]:
    """Return which Python and which packages a site needs, from the project's own file or its installed description."""
    table = own_project()
    if "requires-python" in table:
        return str(table["requires-python"]), _of_table(table)
    described = metadata.metadata("fedllm")
    return str(described["Requires-Python"]), _of_installed(EXTRA)


def _of_table(table: Mapping[str, Any]) -> list[Requirement]:
    extras = table.get("optional-dependencies", {})

    def of_lines(lines: Iterable[str]) -> Iterator[Requirement]:
        for requirement in map(Requirement, lines):
            if requirement.name == table["name"]:
                for extra in requirement.extras:
                    yield from of_lines(extras[extra])
            elif requirement.marker is None or requirement.marker.evaluate():
                yield requirement

    return list(of_lines([*table["dependencies"], *extras[EXTRA]]))


def _of_installed(extra: str) -> list[Requirement]:
    found: list[Requirement] = []
    for requirement in map(Requirement, metadata.requires("fedllm") or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        nested = requirement.extras if requirement.name == "fedllm" else ()
        found += [inner for name in nested for inner in _of_installed(name)] if nested else [requirement]
    return found


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
