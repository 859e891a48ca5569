"""Computers for tests: network namespaces with an address each on one bridge, or the loopback where none may be made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

NETWORK = "10.213.77"
_SEARCH = "/usr/sbin:/sbin:/usr/bin:/bin"


@dataclass(frozen=True)
class Computer:
    """A place where programs run.

    Attributes:
        address: What others reach it by.
        prefix: What goes before a command that is to run there.
    """

    address: str
    prefix: tuple[str, ...] = ()


@contextmanager
def computers(names: Sequence[str]) -> Iterator[dict[str, Computer]]:
    """Yield computers by name, on a network of their own that leads nowhere else.

    Where namespaces are not permitted, all are this machine's loopback, which is said.
    """
    label, made = f"fedllm{os.getpid()}", []
    try:
        try:
            made.append(_switch(f"{label}-switch"))
            for number, name in enumerate(names, start=1):
                made.append(_computer(f"{label}-{name}", f"{label}-switch", number))
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no network namespaces here ({_words(error)}): all parts share the loopback", file=sys.stderr)
            yield dict.fromkeys(names, Computer("127.0.0.1"))
            return
        prefixes = [("ip", "netns", "exec", one) for one in made[1:]]
        yield {
            name: Computer(f"{NETWORK}.{number}", prefix)
            for number, (name, prefix) in enumerate(zip(names, prefixes, strict=True), start=1)
        }
    finally:
        for name in made:
            _ip("netns", "delete", name)


def _switch(name: str) -> str:
    _ip("netns", "add", name)
    _ip("-n", name, "link", "add", "bridge", "type", "bridge")
    _ip("-n", name, "link", "set", "bridge", "up")
    return name


def _computer(name: str, switch: str, number: int) -> str:
    _ip("netns", "add", name)
    port = f"port{number}"
    _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", switch)
    _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
    _ip("-n", name, "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _ip("-n", name, "link", "set", device, "up")
    return name


def _ip(*arguments: str) -> None:
    program = shutil.which("ip", path=_SEARCH)
    if program is None:
        raise FileNotFoundError("the program ip is not installed")
    subprocess.run([program, *arguments], check=True, capture_output=True, text=True)


def _words(error: OSError | subprocess.CalledProcessError) -> str:
    return str(getattr(error, "stderr", "") or error).strip()
