"""Real parts for tests of the update stream: a server with an open round, a proxy that misbehaves, certificates."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import queue
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedllm.wire.client import UpdateClient
from fedllm.wire.digest import digest_bytes
from fedllm.wire.part import Receipt
from fedllm.wire.server import UpdateServer
from fedllm.wire.spool import Spool
from fedllm.wire.ticket import Direction, TicketKey

RUN = "a-run"


def payload(path: Path, size: int, seed: int = 0) -> Receipt:
    """Write a file of incompressible bytes and return its receipt."""
    data = random.Random(seed).randbytes(size)
    path.write_bytes(data)
    return Receipt(size, digest_bytes(data))


@dataclass
class Site:
    """A server in this process and what a site needs to talk to it."""

    folder: Path
    server: UpdateServer
    spool: Spool
    key: TicketKey

    def ticket(
        self,
        direction: Direction = "push",
        *,
        site: str = "clinic-a",
        round_: int = 1,
        max_bytes: int = 1 << 30,
        lifetime_s: float = 60.0,
        state_id: str = "",
    ) -> str:
        return self.server.issue(
            round_=round_,
            site=site,
            direction=direction,
            max_bytes=max_bytes,
            lifetime_s=lifetime_s,
            state_id=state_id,
        )

    def client(self, port: int | None = None, **settings: object) -> UpdateClient:
        return UpdateClient(f"127.0.0.1:{port or self.server.port}", insecure=True, **settings)  # type: ignore[arg-type]

    def delivered(self, site: str = "clinic-a", round_: int = 1) -> bytes | None:
        path = self.spool.payload_path(round_, site)
        return path.read_bytes() if path.exists() else None


@contextlib.contextmanager
def serving(folder: Path, **settings: object) -> Iterator[Site]:
    """Run an update server without TLS, with round 1 open."""
    spool, key = Spool(folder / "spool"), TicketKey.generate()
    with UpdateServer(spool, key, RUN, ports="0", insecure=True, **settings) as server:  # type: ignore[arg-type]
        server.open_round(1)
        yield Site(folder, server, spool, key)


class ChaosProxy:
    """A TCP relay that cuts connections, changes a byte, or is slow.

    Args:
        target: Port on 127.0.0.1 to relay to.
        cut_at: Totals of client-to-server bytes at which the connection of the moment is reset.
        cut_down_at: The same for server-to-client bytes.
        flip_at: Total of client-to-server bytes at which one byte is changed, once.
        flip_down_at: The same for server-to-client bytes.
        bytes_per_s: Rate of client-to-server bytes, None for no limit.
        bytes_per_s_down: The same for server-to-client bytes.
        delay_s: Seconds that bytes are under way in either direction; a cut loses those that are.
    """

    BLOCK = 16384

    def __init__(
        self,
        target: int,
        *,
        cut_at: tuple[int, ...] = (),
        cut_down_at: tuple[int, ...] = (),
        flip_at: int | None = None,
        flip_down_at: int | None = None,
        bytes_per_s: float | None = None,
        bytes_per_s_down: float | None = None,
        delay_s: float = 0.0,
    ) -> None:
        self.target = target
        self.delay_s = delay_s
        self.up = _Flow(list(cut_at), flip_at, bytes_per_s)
        self.down = _Flow(list(cut_down_at), flip_down_at, bytes_per_s_down)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.num_connections = 0
        self._is_down = False
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> ChaosProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Reset all connections."""
        for pair in self._pairs:
            _reset(*pair)

    def go_down(self) -> None:
        """Reset all connections and every new one."""
        self._is_down = True
        self.cut()

    def come_up(self) -> None:
        """Relay new connections again."""
        self._is_down = False

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self._is_down:
                    _reset(near)
                    continue
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    _reset(near)
                    continue
                for end in (near, far):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.num_connections += 1
                self._pairs.append((near, far))
                for source, sink, flow in ((near, far, self.up), (far, near, self.down)):
                    threading.Thread(target=self._relay, args=(source, sink, flow), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, flow: _Flow) -> None:
        send = _Delayed(sink, self.delay_s).send if self.delay_s else sink.sendall
        try:
            while data := source.recv(self.BLOCK):
                data = flow.changed(data)
                flow.num_bytes += len(data)
                if flow.cut_at and flow.num_bytes >= flow.cut_at[0]:
                    flow.cut_at.pop(0)
                    break
                send(data)
                flow.rest(len(data))
        except OSError:
            pass
        _reset(source, sink)


@dataclass
class _Flow:
    cut_at: list[int]
    flip_at: int | None
    bytes_per_s: float | None
    num_bytes: int = 0

    def changed(self, data: bytes) -> bytes:
        if self.flip_at is None or not self.num_bytes <= self.flip_at < self.num_bytes + len(data):
            return data
        position, self.flip_at = self.flip_at - self.num_bytes, None
        return data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]

    def rest(self, num_bytes: int) -> None:
        """Wait as the rate demands, also if the rate changes meanwhile."""
        started = time.monotonic()
        while (rate := self.bytes_per_s) and (left := started + num_bytes / rate - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))


class _Delayed:
    """Sends what it is given a fixed time later; what waits when the socket closes is lost."""

    def __init__(self, sink: socket.socket, delay_s: float) -> None:
        self._sink, self._delay_s = sink, delay_s
        self._waiting: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def send(self, data: bytes) -> None:
        self._waiting.put((time.monotonic() + self._delay_s, data))

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while self._sink.fileno() >= 0:
                with contextlib.suppress(queue.Empty):
                    due, data = self._waiting.get(timeout=1.0)
                    time.sleep(max(0.0, due - time.monotonic()))
                    self._sink.sendall(data)


def _reset(*ends: socket.socket) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.shutdown(socket.SHUT_RDWR)
        end.close()


@dataclass(frozen=True)
class Certificates:
    """Files of a small authority and one server that it signed."""

    ca: Path
    certificate: Path
    key: Path


def make_certificates(folder: Path) -> Certificates:
    """Make an authority and a certificate for 127.0.0.1 and localhost."""
    folder.mkdir(parents=True, exist_ok=True)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test authority")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    ca = _builder(ca_name, ca_name, ca_key).add_extension(
        x509.BasicConstraints(ca=True, path_length=None), critical=True
    )
    leaf = _builder(x509.Name([]), ca_name, key).add_extension(x509.SubjectAlternativeName(names), critical=True)
    files = Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    pem = serialization.Encoding.PEM
    files.ca.write_bytes(ca.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    files.certificate.write_bytes(leaf.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    no_password = serialization.NoEncryption()
    files.key.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, no_password))
    return files


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
    )
