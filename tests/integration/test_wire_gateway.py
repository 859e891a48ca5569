"""The gateway's configuration in a real nginx, with our update server and a stand-in for Flower's HTTP behind it."""

from __future__ import annotations

import http.client
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from fedllm.errors import CancelledError, TransportError
from fedllm.provision.authority import Authority, read_certificate, write_certificate
from fedllm.provision.keys import new_key, write_key
from fedllm.wire.client import UpdateClient
from fedllm.wire.server import UpdateServer
from fedllm.wire.spool import Spool
from fedllm.wire.stream import StreamClientTransport, StreamServerTransport
from fedllm.wire.ticket import TicketKey
from fedllm.wire.tls import TlsConfig
from tests.free_ports import free_port
from tests.wire_tools import RUN, ChaosProxy, Site, payload

MIB = 1 << 20
TEMPLATE = Path(__file__).parents[2] / "deploy" / "gateway" / "nginx.conf"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian: apt-get install nginx-light)")


class Flower(BaseHTTPRequestHandler):
    """Answers as the SuperLink would: says what it was asked."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = f"{self.command} {self.path} {len(body)}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class Gateway(Site):
    """A public port with everything behind it."""

    port: int
    ca: Path
    member: TlsConfig
    revoked: TlsConfig

    def connect(self, through: int | None = None, **settings: object) -> UpdateClient:
        settings = {"tls": self.member, "port": self.server.port} | settings
        return UpdateClient(f"127.0.0.1:{through or self.port}", **settings)  # type: ignore[arg-type]

    def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        context = ssl.create_default_context(cafile=str(self.ca))
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=context, timeout=10)
        connection.request(method, path, body)
        response = connection.getresponse()
        answer = response.status, response.read()
        connection.close()
        return answer


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    authority = Authority.create("gateway-test", days=2)
    authority.write(folder)
    key = new_key()
    write_key(folder / "server.key", key)
    certificate = authority.server_certificate(key.public_key(), ("localhost", "127.0.0.1"), days=1)
    write_certificate(folder / "server.crt", certificate)
    member, revoked = (_site(folder, authority, name) for name in ("member", "revoked"))
    assert revoked.certificate is not None
    revocations = authority.revocations([read_certificate(revoked.certificate)])
    (folder / "revoked.pem").write_bytes(revocations.public_bytes(Encoding.PEM))
    flower = ThreadingHTTPServer(("127.0.0.1", 0), Flower)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    flower.socket = context.wrap_socket(flower.socket, server_side=True)
    threading.Thread(target=flower.serve_forever, daemon=True).start()
    port = free_port()
    values = {
        "GATEWAY_PORT": f"127.0.0.1:{port}",
        "GATEWAY_CERTIFICATE": "server.crt",
        "GATEWAY_KEY": "server.key",
        "AUTHORITY": "ca.crt",
        "SUPERLINK": f"https://127.0.0.1:{flower.server_port}",
        "SUPERLINK_NAME": "localhost",
        "UPDATES_HOST": "127.0.0.1",
        "RESOLVER": "127.0.0.1",
    }
    text = re.sub(r"\$\{(\w+)\}", lambda match: str(values[match[1]]), TEMPLATE.read_text())
    text = text.replace("/tmp/fedllm-gateway", str(folder / "gateway")).replace(
        "/dev/stdout", str(folder / "access.log")
    )
    (folder / "nginx.conf").write_text(text)
    shutil.copy(TEMPLATE.with_name("site-certificates.conf"), folder)
    assert NGINX is not None
    command = [NGINX, "-c", str(folder / "nginx.conf"), "-p", str(folder), "-e", "stderr", "-g", "daemon off;"]
    with (folder / "error.log").open("w") as log:
        nginx = subprocess.Popen(command, stderr=log)
    spool, tickets = Spool(folder / "spool"), TicketKey.generate()
    try:
        with UpdateServer(spool, tickets, RUN, insecure=True) as server:
            server.open_round(1)
            _wait_for(port, nginx, folder / "error.log")
            yield Gateway(folder, server, spool, tickets, port, folder / "ca.crt", member, revoked)
    finally:
        nginx.terminate()
        nginx.wait()
        flower.shutdown()
        flower.server_close()


def _site(folder: Path, authority: Authority, name: str) -> TlsConfig:
    key = new_key()
    write_key(folder / f"{name}.key", key)
    write_certificate(folder / f"{name}.crt", authority.site_certificate(key.public_key(), name, days=1))
    return TlsConfig(folder / "ca.crt", folder / f"{name}.crt", folder / f"{name}.key")


def _wait_for(port: int, nginx: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        assert nginx.poll() is None, log.read_text()
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise AssertionError("nginx does not listen")


def test_a_push_and_a_fetch_pass_the_gateway(gateway: Gateway):
    source = gateway.folder / "update"
    receipt = payload(source, 20 * MIB + 5)
    gateway.connect().push(gateway.ticket(site="passes"), source, receipt)
    assert gateway.delivered("passes") == source.read_bytes()
    gateway.server.publish("state", source)
    ticket = gateway.ticket("fetch", site="passes", state_id="state")
    assert gateway.connect().fetch(ticket, gateway.folder / "back", receipt).read_bytes() == source.read_bytes()


def test_the_whole_transport_passes_the_gateway(gateway: Gateway):
    transport = StreamServerTransport(
        gateway.server, gateway.spool, lifetime_s=60, advertise=f"127.0.0.1:{gateway.port}"
    )
    transport.open_round(7)
    payload(gateway.folder / "global", MIB)
    payload(gateway.folder / "local", MIB, seed=1)
    transport.publish("global", gateway.folder / "global")
    instruction = transport.offer(round_=7, site="a", state_id="global", max_update_bytes=MIB)
    client = StreamClientTransport(partial(UpdateClient, tls=gateway.member))
    client.fetch(instruction, gateway.folder / "got")
    received = transport.receive(round_=7, site="a", reply=client.push(instruction, gateway.folder / "local"))
    assert (gateway.folder / "got").read_bytes() == (gateway.folder / "global").read_bytes()
    assert received.read_bytes() == (gateway.folder / "local").read_bytes()


def test_a_push_goes_on_behind_the_gateway_after_a_cut(gateway: Gateway):
    source = gateway.folder / "resumed"
    receipt = payload(source, 24 * MIB, seed=2)
    with ChaosProxy(gateway.port, cut_at=(12 * MIB,)) as proxy:
        gateway.connect(proxy.port).push(gateway.ticket(site="resumed"), source, receipt)
    assert gateway.delivered("resumed") == source.read_bytes()
    assert proxy.num_connections == 2
    assert proxy.up.num_bytes < receipt.size + 10 * MIB, "windows of two hops, and no second beginning"


def test_refusals_and_closed_rounds_reach_the_site_through_the_gateway(gateway: Gateway):
    source = gateway.folder / "refused"
    receipt = payload(source, 8 * MIB, seed=3)
    with pytest.raises(TransportError, match="not issued by this server"):
        gateway.connect().push("nonsense", source, receipt)
    gateway.server.open_round(2)
    with ChaosProxy(gateway.port, bytes_per_s=2 * MIB) as proxy, ThreadPoolExecutor(1) as pool:
        push = pool.submit(gateway.connect(proxy.port).push, gateway.ticket(round_=2), source, receipt)
        while proxy.up.num_bytes < 3 * MIB:
            time.sleep(0.01)
        gateway.server.close_round(2)
        with pytest.raises(CancelledError, match="Round 2 is closed"):
            push.result(timeout=60)


def test_only_sites_with_a_certificate_that_holds_may_send_updates(gateway: Gateway):
    source = gateway.folder / "stranger"
    receipt = payload(source, 10, seed=6)
    for tls in (TlsConfig(ca=gateway.ca), gateway.revoked):
        client = gateway.connect(tls=tls, quiet_s=0.5, stall_s=2.0)
        with pytest.raises(TransportError):
            client.push(gateway.ticket(site="stranger"), source, receipt)
    gateway.connect().push(gateway.ticket(site="stranger"), source, receipt)
    assert gateway.delivered("stranger") == source.read_bytes()


def test_two_runs_share_one_gateway(gateway: Gateway):
    source = gateway.folder / "second-run"
    receipt = payload(source, MIB, seed=4)
    with UpdateServer(Spool(gateway.folder / "second"), TicketKey.generate(), "second", insecure=True) as second:
        assert second.port != gateway.server.port
        second.open_round(1)
        ticket = second.issue(round_=1, site="a", direction="push", max_bytes=MIB, lifetime_s=60)
        gateway.connect(port=second.port).push(ticket, source, receipt)
        assert second.wait_for(1, "a", 0) == receipt


def test_flowers_fleet_and_health_are_reached_with_large_bodies(gateway: Gateway):
    assert gateway.ask("GET", "/health") == (200, b"GET /health 0")
    assert gateway.ask("POST", "/v1/fleet/push-object", bytes(17 * MIB)) == (
        200,
        f"POST /v1/fleet/push-object {17 * MIB}".encode(),
    )


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/fleet",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet//../control/start-run",
        "/health/../v1/control/start-run",
        "/healthy",
        "/docs",
        "/openapi.json",
        "/fedllm.wire.v2.Updates/Push",
        "/flwr.proto.Control/StartRun",
    ],
)
def test_everything_else_is_refused(gateway: Gateway, path: str):
    for method in ("GET", "POST"):
        status, answer = gateway.ask(method, path)
        assert status in (403, 404) or (status == 301 and path == "/v1/fleet"), answer


def test_only_ports_of_update_servers_can_be_asked_for(gateway: Gateway):
    """A port outside the range falls back to the first update server, whatever listens there."""
    source = gateway.folder / "elsewhere"
    receipt = payload(source, 10, seed=5)
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.5)
        with pytest.raises(TransportError):
            gateway.connect(port=other.getsockname()[1], quiet_s=0.5, stall_s=2.0).push("nonsense", source, receipt)
        with pytest.raises(TimeoutError):
            other.accept()
