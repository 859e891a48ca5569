"""A process that has the heavy libraries loaded and becomes a ClientApp for every message: ``python -P warm.py FOLDER``.

Flower starts a process for every message. Importing torch, transformers, peft and bitsandbytes takes it some ten seconds of
a core before it does anything, more than all else that a round costs beside its training. This process imports them once
and forks for every message: the child has them, and is as separate from other messages' as before.

``FOLDER/bin/flwr-clientapp`` is what the SuperExec finds in place of Flower's own program (:func:`write_program`). It hands
its arguments and its output over through the socket ``FOLDER/warm``, which only its owner can use, and ends. Where nobody
answers, it becomes Flower's program, which imports everything itself.

Nothing of ours is imported here, since the app that a run brings along brings its own copy. Nor is anything that may reach
for a GPU, because CUDA cannot be used in a child once its parent did: where there is a GPU, torch alone is imported, which
waits with CUDA until it is used.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PROGRAM = "flwr-clientapp"
ENTRY = "flwr.supernode.cli.flwr_clientapp"
LIGHT = (ENTRY, "flwr.clientapp", "grpc", "numba", "safetensors.numpy")
HEAVY = (
    "torch",
    "bitsandbytes",
    "peft",
    "transformers.models.llama.modeling_llama",
    "transformers.integrations.bitsandbytes",
)
ON_GPUS = ("torch",)
GPUS = ("/dev/nvidiactl", "/dev/kfd")
"""What NVIDIA's and AMD's drivers make."""

SOCKET = "warm"
"""Is there once the libraries are loaded."""

REQUEST_S = 5.0
MAX_REQUEST_BYTES = 1 << 16


def warm_command(folder: Path) -> list[str]:
    """Return the command of this program; without ``-P`` Python would look for modules in this file's folder first."""
    return [sys.executable, "-P", str(Path(__file__).absolute()), str(folder)]


def write_program(folder: Path) -> Path:
    """Write what is called in place of Flower's program, and return its folder, to be put first on the path."""
    program = folder / "bin" / PROGRAM
    program.parent.mkdir(mode=0o700, exist_ok=True)
    own = Path(sys.executable).with_name(PROGRAM)
    command = [sys.executable, "-IS", str(Path(__file__).absolute()), str(folder), str(own)]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    program.chmod(0o700)
    return program.parent


def serve(folder: str) -> list[str]:
    """Fork for every request; return only in the child, with its arguments and its output in place."""
    _import_libraries()
    with socket.socket(socket.AF_UNIX) as listener:
        with _inside(folder):
            Path(SOCKET).unlink(missing_ok=True)
            listener.bind(SOCKET)
            os.chmod(SOCKET, 0o600)
        listener.listen(64)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
        while True:
            connection, _ = listener.accept()
            with connection:
                arguments, outputs = _received(connection)
                if len(outputs) == 2 and os.fork() == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    os.dup2(outputs[0], 1)
                    os.dup2(outputs[1], 2)
                    _close(outputs)
                    connection.sendall(b"+")
                    return arguments
                _close(outputs)


def hand_over(folder: str, arguments: Sequence[str]) -> bool:
    """Hand over a ClientApp's arguments and this process's output; False where nobody takes them."""
    try:
        with socket.socket(socket.AF_UNIX) as connection, _inside(folder):
            connection.connect(SOCKET)
            socket.send_fds(connection, [json.dumps(list(arguments)).encode() + b"\n"], [1, 2])
            return connection.recv(1) == b"+"
    except OSError:
        return False


def _received(connection: socket.socket) -> tuple[list[str], list[int]]:
    """Read a request: arguments, and descriptors of its output and its errors; none of those where it cannot be read."""
    connection.settimeout(REQUEST_S)
    received, outputs = b"", list[int]()
    try:
        while not received.endswith(b"\n") and len(received) < MAX_REQUEST_BYTES:
            part, more, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 2)
            received, outputs = received + part, outputs + more
            if not part:
                break
        return [str(argument) for argument in json.loads(received)], outputs
    except (OSError, ValueError) as error:
        print(f"a request to the warm process cannot be read: {error}", file=sys.stderr, flush=True)
        _close(outputs)
        return [], []


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _import_libraries() -> None:
    """Import what ClientApps will; what cannot be imported is left to those that need it."""
    began = time.monotonic()
    for name in LIGHT + (ON_GPUS if any(map(os.path.exists, GPUS)) else HEAVY):
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"not kept warm: {error}", file=sys.stderr)
    print(f"libraries are loaded after {time.monotonic() - began:.1f} s; messages need not load them", flush=True)


@contextmanager
def _inside(folder: str) -> Iterator[None]:
    """Work in a folder: a socket's whole path may have a hundred characters at most."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _main() -> None:
    folder, *rest = sys.argv[1:]
    if not rest:
        sys.argv = [PROGRAM, *serve(folder)]
        sys.exit(importlib.import_module(ENTRY).flwr_clientapp())
    program, *arguments = rest
    if not hand_over(folder, arguments):
        os.execv(program, [program, *arguments])


if __name__ == "__main__":
    _main()
