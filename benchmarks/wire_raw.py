"""The limit for the update stream: a bare gRPC stream of the same chunks, without checks, tickets or files.

    python -m benchmarks.wire_raw --megabytes 200 --clients 1 2 --repeats 3

The server is asynchronous like ours, runs in a process of its own, and keeps nothing. Messages are plain bytes, so not even
protobuf stands between the numbers and gRPC. A measurement spans connecting to the last byte, as for the update stream.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import grpc
import grpc.aio

from fedllm.wire.digest import CHUNK_BYTES
from fedllm.wire.methods import CLIENT_OPTIONS, SERVER_OPTIONS

SERVICE = "fedllm.benchmarks.Raw"
_processes = multiprocessing.get_context("spawn")


@contextlib.contextmanager
def raw_server() -> Iterator[str]:
    """Run a bare server in another process; gives its address."""
    ours, theirs = _processes.Pipe()
    server = _processes.Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    try:
        yield f"127.0.0.1:{ours.recv()}"
    finally:
        server.terminate()
        server.join()


def raw_fetch(address: str, num_chunks: int) -> None:
    """Read a stream of chunks and drop them."""
    with grpc.insecure_channel(address, CLIENT_OPTIONS) as channel:
        received = sum(1 for _ in channel.unary_stream(f"/{SERVICE}/Fetch")(str(num_chunks).encode()))
    assert received == num_chunks


def raw_push(address: str, num_chunks: int) -> None:
    """Send one chunk again and again."""
    chunk = os.urandom(CHUNK_BYTES)
    with grpc.insecure_channel(address, CLIENT_OPTIONS) as channel:
        received = channel.stream_unary(f"/{SERVICE}/Push")(chunk for _ in range(num_chunks))
    assert int(received) == num_chunks * CHUNK_BYTES


def measure(work: Callable[..., None], arguments: list[tuple[Any, ...]]) -> float:
    """Run one process per tuple of arguments at the same time; return the seconds from the first start to the last end."""
    barrier, times = _processes.Barrier(len(arguments)), _processes.SimpleQueue()
    clients = [_processes.Process(target=_timed, args=(work, args, barrier, times)) for args in arguments]
    for client in clients:
        client.start()
    spans = [times.get() for _ in clients]
    for client in clients:
        client.join()
    return max(end for _, end in spans) - min(start for start, _ in spans)


def _timed(work: Callable[..., None], arguments: tuple[Any, ...], barrier: Any, times: Any) -> None:
    barrier.wait()
    start = time.monotonic()
    work(*arguments)
    times.put((start, time.monotonic()))


def _serve(parent: Connection) -> None:
    asyncio.run(_run(parent))


async def _run(parent: Connection) -> None:
    chunk = os.urandom(CHUNK_BYTES)

    async def fetch(request: bytes, context: Any) -> None:
        for _ in range(int(request)):
            await context.write(chunk)

    async def push(requests: Any, _: Any) -> bytes:
        return str(sum([len(message) async for message in requests])).encode()

    methods = {
        "Fetch": grpc.unary_stream_rpc_method_handler(fetch),
        "Push": grpc.stream_unary_rpc_method_handler(push),
    }
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    parent.send(server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    await server.wait_for_termination()


def main() -> None:
    """Print one JSON line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="MiB moved by each client")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    num_chunks = options.megabytes * (1 << 20) // CHUNK_BYTES
    with raw_server() as address:
        for num_clients in options.clients:
            for work in (raw_fetch, raw_push):
                times = [measure(work, [(address, num_chunks)] * num_clients) for _ in range(options.repeats)]
                rates = [round(num_clients * num_chunks * CHUNK_BYTES / 1e6 / seconds) for seconds in times]
                print(json.dumps({"what": work.__name__, "clients": num_clients, "megabytes_per_s": rates}), flush=True)


if __name__ == "__main__":
    main()
