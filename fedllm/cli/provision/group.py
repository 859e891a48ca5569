"""``fedllm provision``: keys, certificates and kits of a federation."""

from __future__ import annotations

from fedllm.cli.command import Group
from fedllm.cli.provision import make, renew, request, revoke, sign, status

_COMMANDS = (make.COMMAND, request.COMMAND, sign.COMMAND, revoke.COMMAND, renew.COMMAND, status.COMMAND)

GROUP = Group("provision", "make what a server and its sites need from federation.toml", _COMMANDS, default="make")
