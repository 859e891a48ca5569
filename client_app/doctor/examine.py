"""All checks, in the order in which a person reads them.

A check is a function from a :class:`~client_app.doctor.case.Case` to findings; to add one, write it and name it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module

from client_app.doctor.case import Case
from client_app.doctor.certificates import examine_certificates
from client_app.doctor.finding import Finding, failure
from client_app.doctor.flower import examine_flower
from client_app.doctor.identity import examine_identity
from client_app.doctor.software import examine_software
from client_app.doctor.updates import examine_updates
from fedllm.errors import FedLLMError

Check = Callable[[Case], Iterator[Finding]]


def examine(case: Case) -> Iterator[Finding]:
    """Look at everything; findings come as they are made. A check that fails on its way is a finding too."""
    for name, check in checks().items():
        yield from guarded(name, check, case)


def guarded(name: str, check: Check, case: Case) -> Iterator[Finding]:
    """Make one check, and turn its errors into findings."""
    try:
        yield from check(case)
    except FedLLMError as error:
        yield failure(name, str(error), "Correct what the message names, and run the doctor again.")
    except OSError as error:
        yield failure(
            name, f"could not be looked at: {error}", "See whether the user who runs the doctor may look there."
        )


def checks() -> dict[str, Check]:
    """Return the checks by name, in order."""
    return {
        "software": lambda _: examine_software(),
        "certificates": examine_certificates,
        "node key": examine_identity,
        "server": examine_flower,
        "updates": examine_updates,
        "device": _later("hardware", "examine_hardware"),
        "base": _later("base", "examine_base"),
        "memory": _later("memory", "examine_memory"),
        "folders": _later("folders", "examine_folders"),
        "data": _later("data", "examine_data"),
    }


def _later(module: str, name: str) -> Check:
    """Return a check that is imported when it is made: torch takes seconds, and what needs none is shown at once."""
    return lambda case: getattr(import_module(f"client_app.doctor.{module}"), name)(case)
