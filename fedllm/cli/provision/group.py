"""``fedllm provision``: keys, certificates and kits of a federation."""

from __future__ import annotations

from fedllm.cli.command import Group
from fedllm.cli.provision import make

GROUP = Group(
    "provision", "make what a server and its sites need from federation.toml", (make.COMMAND,), default="make"
)
