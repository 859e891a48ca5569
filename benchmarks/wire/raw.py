"""The limit for the update stream: a bare gRPC stream of the same chunks, without checks, tickets or files.

The server is asynchronous like ours, runs in a process of its own, and keeps nothing. Messages are plain bytes that lie
ready in memory, a different one for every chunk (one sent again and again would never leave the processor's cache), so
not even protobuf stands between the numbers and gRPC. A measurement spans connecting to the last byte, as for the update
stream. Tuned, both ends keep freed buffers as ours do (:mod:`fedllm.wire.memory`); else they are as gRPC leaves them.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import grpc
import grpc.aio

from fedllm.wire.digest import CHUNK_BYTES
from fedllm.wire.memory import keep_freed_buffers
from fedllm.wire.methods import CLIENT_OPTIONS, SERVER_OPTIONS

SERVICE = "fedllm.benchmarks.Raw"
_processes = multiprocessing.get_context("spawn")


@contextlib.contextmanager
def raw_server(*, is_tuned: bool) -> Iterator[str]:
    """Run a bare server in another process; gives its address."""
    ours, theirs = _processes.Pipe()
    server = _processes.Process(target=_serve, args=(theirs, is_tuned), daemon=True)
    server.start()
    try:
        yield f"127.0.0.1:{ours.recv()}"
    finally:
        server.terminate()
        server.join()


def raw_fetch(address: str, num_chunks: int, is_tuned: bool) -> Callable[[], None]:
    """Return what reads a stream of chunks and drops them."""
    _prepare(is_tuned=is_tuned)

    def fetch() -> None:
        with grpc.insecure_channel(address, CLIENT_OPTIONS) as channel:
            received = sum(1 for _ in channel.unary_stream(f"/{SERVICE}/Fetch")(str(num_chunks).encode()))
        assert received == num_chunks

    return fetch


def raw_push(address: str, num_chunks: int, is_tuned: bool) -> Callable[[], None]:
    """Return what sends chunks that are in memory."""
    _prepare(is_tuned=is_tuned)
    chunks = [os.urandom(CHUNK_BYTES) for _ in range(num_chunks)]

    def push() -> None:
        with grpc.insecure_channel(address, CLIENT_OPTIONS) as channel:
            received = channel.stream_unary(f"/{SERVICE}/Push")(iter(chunks))
        assert int(received) == num_chunks * CHUNK_BYTES

    return push


def measure(prepare: Callable[..., Callable[[], object]], arguments: list[tuple[Any, ...]]) -> float:
    """Run one process per tuple of arguments at the same time and return the seconds from the first start to the last end.

    Args:
        prepare: Called in each process, untimed; what it returns is called and timed.
        arguments: Arguments of ``prepare``, picklable.
    """
    barrier, times = _processes.Barrier(len(arguments)), _processes.SimpleQueue()
    clients = [_processes.Process(target=_timed, args=(prepare, args, barrier, times)) for args in arguments]
    for client in clients:
        client.start()
    spans = [times.get() for _ in clients]
    for client in clients:
        client.join()
    return max(end for _, end in spans) - min(start for start, _ in spans)


def _timed(prepare: Callable[..., Callable[[], object]], arguments: tuple[Any, ...], barrier: Any, times: Any) -> None:
    work = prepare(*arguments)
    barrier.wait()
    start = time.monotonic()
    work()
    times.put((start, time.monotonic()))


def _prepare(*, is_tuned: bool) -> None:
    if is_tuned:
        keep_freed_buffers()


def _serve(parent: Connection, is_tuned: bool) -> None:
    _prepare(is_tuned=is_tuned)
    asyncio.run(_run(parent))


async def _run(parent: Connection) -> None:
    chunks = [os.urandom(CHUNK_BYTES) for _ in range(256)]

    async def fetch(request: bytes, context: Any) -> None:
        for index in range(int(request)):
            await context.write(chunks[index % len(chunks)])

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
