"""``fedllm site``: what the people of a site do on their own machine.

To add a command, write a module beside this one with a ``COMMAND``, and name it here.
"""

from __future__ import annotations

from fedllm.cli.command import Group
from fedllm.cli.site import audit, doctor, metrics, start, status, stop

GROUP = Group(
    "site",
    "serve a federation from this machine",
    (doctor.COMMAND, start.COMMAND, status.COMMAND, stop.COMMAND, audit.COMMAND, metrics.COMMAND),
)
