"""The update stream between real servers and clients on 127.0.0.1, over connections that break."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from fedllm.errors import CancelledError, ConfigError, CorruptPayloadError, TicketError, TransportError
from fedllm.wire.client import UpdateClient
from fedllm.wire.digest import CHUNK_BYTES
from fedllm.wire.framing import READ_AHEAD
from fedllm.wire.methods import WINDOW_BYTES
from fedllm.wire.part import Receipt
from fedllm.wire.server import UpdateServer
from fedllm.wire.spool import Spool
from fedllm.wire.ticket import TicketKey
from fedllm.wire.tls import TlsConfig
from tests.free_ports import free_port
from tests.wire_tools import RUN, ChaosProxy, Site, make_certificates, payload, serving

MIB = 1 << 20
LOST_BY_A_CUT = WINDOW_BYTES + 2 * READ_AHEAD * CHUNK_BYTES
"""What is on its way, waiting at the receiver, and being written."""
SLACK = 128 * 1024
"""Bytes of HTTP/2 and TCP around the payload in a test's transfers."""

processes = multiprocessing.get_context("spawn")


@pytest.fixture
def site(tmp_path: Path):
    with serving(tmp_path) as site:
        yield site


def test_a_push_arrives_whole_and_a_fetch_returns_the_same_bytes(site: Site):
    source = site.folder / "update"
    receipt = payload(source, 3 * MIB + 17)
    site.client().push(site.ticket(), source, receipt)
    assert site.delivered() == source.read_bytes()
    site.server.publish("state", source)
    back = site.client().fetch(site.ticket("fetch", state_id="state"), site.folder / "back", receipt)
    assert back.read_bytes() == source.read_bytes()
    assert [path.name for path in site.folder.glob("back*")] == ["back"]


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_payloads_of_awkward_sizes_travel(site: Site, size: int):
    source = site.folder / "update"
    receipt = payload(source, size)
    site.client().push(site.ticket(), source, receipt)
    assert site.delivered() == source.read_bytes()
    site.server.publish("state", source)
    back = site.client().fetch(site.ticket("fetch", state_id="state"), site.folder / "back", receipt)
    assert back.read_bytes() == source.read_bytes()


def test_a_push_goes_on_where_a_broken_connection_left_it(site: Site):
    source = site.folder / "update"
    receipt = payload(source, 24 * MIB)
    with ChaosProxy(site.server.port, cut_at=(8 * MIB + 500_000, 20 * MIB)) as proxy:
        site.client(proxy.port).push(site.ticket(), source, receipt)
    assert site.delivered() == source.read_bytes()
    assert proxy.num_connections == 3
    assert proxy.up.num_bytes - receipt.size <= 2 * LOST_BY_A_CUT + SLACK


def test_a_fetch_goes_on_where_a_broken_connection_left_it(site: Site):
    source = site.folder / "state"
    receipt = payload(source, 12 * MIB)
    site.server.publish("state", source)
    with ChaosProxy(site.server.port, cut_down_at=(8 * MIB + 500_000,)) as proxy:
        ticket = site.ticket("fetch", state_id="state")
        back = site.client(proxy.port).fetch(ticket, site.folder / "back", receipt)
    assert back.read_bytes() == source.read_bytes()
    assert proxy.num_connections == 3, "two for the state, one to confirm it"
    assert proxy.down.num_bytes - receipt.size <= LOST_BY_A_CUT + SLACK


def test_a_byte_changed_on_the_way_up_is_found_and_sent_again(site: Site, caplog: pytest.LogCaptureFixture):
    source = site.folder / "update"
    receipt = payload(source, 4 * MIB)
    with ChaosProxy(site.server.port, flip_at=2 * MIB + 300_000) as proxy, caplog.at_level(logging.INFO):
        site.client(proxy.port).push(site.ticket(), source, receipt)
    assert "does not have its checksum" in caplog.text
    assert site.delivered() == source.read_bytes()


def test_a_byte_changed_on_the_way_down_is_found_and_asked_for_again(site: Site, caplog: pytest.LogCaptureFixture):
    source = site.folder / "state"
    receipt = payload(source, 4 * MIB)
    site.server.publish("state", source)
    with ChaosProxy(site.server.port, flip_down_at=2 * MIB + 300_000) as proxy, caplog.at_level(logging.INFO):
        ticket = site.ticket("fetch", state_id="state")
        back = site.client(proxy.port).fetch(ticket, site.folder / "back", receipt)
    assert "does not have its checksum" in caplog.text
    assert back.read_bytes() == source.read_bytes()


def _push_slowly(port: int, ticket: str, source: Path, receipt: Receipt) -> None:
    UpdateClient(f"127.0.0.1:{port}", insecure=True).push(ticket, source, receipt)


def test_a_client_killed_half_way_leaves_nothing_complete_and_another_can_go_on(site: Site):
    source = site.folder / "update"
    receipt = payload(source, 8 * MIB)
    ticket = site.ticket()
    with ChaosProxy(site.server.port, bytes_per_s=4 * MIB) as proxy:
        client = processes.Process(target=_push_slowly, args=(proxy.port, ticket, source, receipt))
        client.start()
        _until(lambda: proxy.up.num_bytes > 3 * MIB)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        client.join()
    assert list((site.spool.folder / "complete").rglob("*.payload")) == []
    assert site.spool.receipt(1, "clinic-a") is None
    with ChaosProxy(site.server.port) as proxy:
        site.client(proxy.port).push(ticket, source, receipt)
    assert site.delivered() == source.read_bytes()
    assert proxy.up.num_bytes < 6.5 * MIB


def test_a_push_survives_a_restart_of_the_server(tmp_path: Path):
    source = tmp_path / "update"
    receipt = payload(source, 8 * MIB)
    spool, key = Spool(tmp_path / "spool"), TicketKey.generate()
    first = UpdateServer(spool, key, RUN, ports="0", insecure=True)
    first.open_round(1)
    ticket = first.issue(round_=1, site="clinic-a", direction="push", max_bytes=receipt.size, lifetime_s=60)
    with ChaosProxy(first.port, bytes_per_s=8 * MIB) as proxy, ThreadPoolExecutor(1) as pool:
        client = UpdateClient(f"127.0.0.1:{proxy.port}", insecure=True)
        push = pool.submit(client.push, ticket, source, receipt)
        _until(lambda: proxy.up.num_bytes > 3 * MIB)
        first.stop()
        with UpdateServer(Spool(spool.folder), key, RUN, ports="0", insecure=True) as second:
            proxy.target = second.port
            second.open_round(1, keep=True)
            push.result()
            assert second.wait_for(1, "clinic-a", 0) == receipt
    assert proxy.up.num_bytes - receipt.size <= LOST_BY_A_CUT + SLACK
    assert spool.payload_path(1, "clinic-a").read_bytes() == source.read_bytes()


def test_the_same_push_again_is_acknowledged_without_sending_it(site: Site):
    source = site.folder / "update"
    receipt = payload(source, 4 * MIB)
    ticket = site.ticket()
    site.client().push(ticket, source, receipt)
    written = site.spool.payload_path(1, "clinic-a").stat()
    with ChaosProxy(site.server.port) as proxy:
        site.client(proxy.port).push(ticket, source, receipt)
        site.client(proxy.port).push(site.ticket(), source, receipt)
    assert proxy.up.num_bytes < SLACK
    assert site.spool.payload_path(1, "clinic-a").stat() == written


def test_another_update_of_the_same_site_and_round_is_refused(site: Site):
    first, second = site.folder / "first", site.folder / "second"
    ticket = site.ticket()
    site.client().push(ticket, first, payload(first, MIB, seed=1))
    receipt = payload(second, MIB, seed=2)
    for again in (ticket, site.ticket()):
        with pytest.raises(TicketError, match="already used"):
            site.client().push(again, second, receipt)
    assert site.delivered() == first.read_bytes()


def test_a_confirmed_fetch_cannot_be_repeated(site: Site):
    source = site.folder / "state"
    receipt = payload(source, MIB)
    site.server.publish("state", source)
    ticket = site.ticket("fetch", state_id="state")
    site.client().fetch(ticket, site.folder / "back", receipt)
    with pytest.raises(TicketError, match="already used"):
        site.client().fetch(ticket, site.folder / "again", receipt)
    assert not (site.folder / "again").exists()


def test_a_fetch_that_is_never_confirmed_cannot_be_repeated_for_ever(site: Site, monkeypatch: pytest.MonkeyPatch):
    source = site.folder / "state"
    receipt = payload(source, 17 * MIB)
    site.server.publish("state", source)
    ticket = site.ticket("fetch", state_id="state")
    monkeypatch.setattr(UpdateClient, "_confirm", lambda *_: None)
    for _ in range(4):
        site.client().fetch(ticket, site.folder / "back", receipt)
    with pytest.raises(TicketError, match="used up"):
        site.client().fetch(ticket, site.folder / "back4", receipt)


def test_a_full_spool_is_told_to_the_site_without_the_servers_paths(tmp_path: Path):
    spool, source = Spool(tmp_path / "spool", max_bytes=MIB), tmp_path / "update"
    receipt = payload(source, MIB + 1)
    with UpdateServer(spool, TicketKey.generate(), RUN, ports="0", insecure=True) as server:
        server.open_round(1)
        ticket = server.issue(round_=1, site="clinic-a", direction="push", max_bytes=receipt.size, lifetime_s=60)
        with pytest.raises(TransportError, match="cannot use its spool: No space left") as caught:
            UpdateClient(server.address, insecure=True).push(ticket, source, receipt)
    assert str(tmp_path) not in str(caught.value)


def test_the_server_says_when_a_push_is_complete(site: Site):
    source = site.folder / "update"
    receipt = payload(source, 4 * MIB)
    assert site.server.wait_for(1, "clinic-a", 0.01) is None
    with ThreadPoolExecutor(1) as pool, ChaosProxy(site.server.port, bytes_per_s=16 * MIB) as proxy:
        waiting = pool.submit(site.server.wait_for, 1, "clinic-a", 20)
        site.client(proxy.port).push(site.ticket(), source, receipt)
        assert waiting.result(timeout=60) == receipt


def test_tickets_that_do_not_fit_are_refused_and_nothing_is_written(site: Site, caplog: pytest.LogCaptureFixture):
    source = site.folder / "update"
    receipt = payload(source, MIB)
    foreign = TicketKey.generate()
    genuine = site.ticket()
    altered = genuine[:-1] + ("0" if genuine[-1] != "0" else "1")
    tickets = {
        "not issued by this server": foreign.issue(site.key.verify(genuine, run=RUN, direction="push")),
        "or was changed": altered,
        "has expired": site.ticket(lifetime_s=-5),
        "the other direction": site.ticket("fetch"),
        "allows fewer bytes": site.ticket(max_bytes=MIB - 1),
    }
    for message, ticket in tickets.items():
        with pytest.raises(TicketError, match=message):
            site.client().push(ticket, source, receipt)
    assert list(site.spool.folder.rglob("*.part")) == []
    for ticket in tickets.values():
        assert ticket.rpartition(".")[2] not in caplog.text, "a log must not let anyone use a ticket"


def test_a_ticket_of_one_site_never_delivers_for_another(site: Site):
    source = site.folder / "update"
    receipt = payload(source, MIB)
    site.client().push(site.ticket(site="clinic-b"), source, receipt)
    assert site.spool.receipt(1, "clinic-a") is None
    with pytest.raises(TransportError, match="has not delivered"):
        site.spool.take(1, "clinic-a", receipt)


def test_tickets_of_other_rounds_and_of_earlier_attempts_are_refused(site: Site):
    source = site.folder / "update"
    receipt = payload(source, MIB)
    other, earlier = site.ticket(round_=2), site.ticket()
    site.server.open_round(1)
    for ticket in (other, earlier):
        with pytest.raises(CancelledError, match="closed"):
            site.client().push(ticket, source, receipt)
    site.client().push(site.ticket(), source, receipt)


def test_closing_a_round_cancels_a_push_under_way_and_it_is_not_tried_again(site: Site):
    source = site.folder / "update"
    receipt = payload(source, 8 * MIB)
    with ChaosProxy(site.server.port, bytes_per_s=2 * MIB) as proxy, ThreadPoolExecutor(1) as pool:
        push = pool.submit(site.client(proxy.port).push, site.ticket(), source, receipt)
        _until(lambda: proxy.up.num_bytes > 2 * MIB)
        site.server.close_round(1)
        with pytest.raises(CancelledError, match="Round 1 is closed"):
            push.result(timeout=60)
        assert proxy.num_connections == 1
        assert proxy.up.num_bytes < 8 * MIB
    assert list(site.spool.folder.rglob("*.part")) == []


def test_closing_a_round_cancels_a_fetch_under_way(site: Site):
    source = site.folder / "state"
    receipt = payload(source, 16 * MIB)
    site.server.publish("state", source)
    with ChaosProxy(site.server.port, bytes_per_s_down=2 * MIB) as proxy, ThreadPoolExecutor(1) as pool:
        ticket = site.ticket("fetch", state_id="state")
        fetch = pool.submit(site.client(proxy.port).fetch, ticket, site.folder / "back", receipt)
        _until(lambda: proxy.down.num_bytes > 2 * MIB)
        site.server.close_round(1)
        with pytest.raises(CancelledError, match="Round 1 is closed"):
            fetch.result(timeout=60)
    assert not (site.folder / "back").exists()


def test_a_server_stops_at_once_although_a_site_is_slow(site: Site):
    source = site.folder / "state"
    receipt = payload(source, 16 * MIB)
    site.server.publish("state", source)
    with (
        ChaosProxy(site.server.port, bytes_per_s=MIB, bytes_per_s_down=MIB // 2) as proxy,
        ThreadPoolExecutor(2) as pool,
    ):
        client = site.client(proxy.port, quiet_s=0.5)
        pool.submit(client.fetch, site.ticket("fetch", state_id="state"), site.folder / "back", receipt)
        push = pool.submit(client.push, site.ticket(), source, receipt)
        _until(lambda: proxy.down.num_bytes > MIB)
        site.server.stop()
        assert proxy.down.num_bytes < 8 * MIB, "it did not wait for the fetch to end"
        proxy.cut()
        with pytest.raises(TransportError, match="gave up"):
            push.result(timeout=60)


def _push_until_told(port: int, ticket: str, source: Path, receipt: Receipt, pipe) -> None:
    client = UpdateClient(f"127.0.0.1:{port}", insecure=True, should_stop=pipe.poll)
    try:
        client.push(ticket, source, receipt)
    except CancelledError:
        pipe.send("cancelled")


def test_a_process_that_stops_a_push_on_a_dead_connection_ends_soon(site: Site):
    source = site.folder / "update"
    receipt = payload(source, 8 * MIB)
    ours, theirs = processes.Pipe()
    with ChaosProxy(site.server.port, bytes_per_s=MIB) as proxy:
        arguments = (proxy.port, site.ticket(), source, receipt, theirs)
        client = processes.Process(target=_push_until_told, args=arguments)
        client.start()
        _until(lambda: proxy.up.num_bytes > MIB)
        proxy.up.bytes_per_s = 0.01
        ours.send("stop")
        assert ours.poll(60)
        client.join(60)
        assert client.exitcode == 0


def test_the_caller_can_stop_a_push(site: Site):
    source = site.folder / "update"
    receipt = payload(source, 8 * MIB)
    stop = threading.Event()
    with ChaosProxy(site.server.port, bytes_per_s=MIB) as proxy, ThreadPoolExecutor(1) as pool:
        push = pool.submit(site.client(proxy.port, should_stop=stop.is_set).push, site.ticket(), source, receipt)
        _until(lambda: proxy.up.num_bytes > MIB)
        stop.set()
        with pytest.raises(CancelledError, match="stopped"):
            push.result(timeout=60)
    assert source.exists()


def test_a_connection_that_stands_still_is_replaced(site: Site):
    source = site.folder / "update"
    receipt = payload(source, 4 * MIB)
    with ChaosProxy(site.server.port, bytes_per_s=MIB) as proxy, ThreadPoolExecutor(1) as pool:
        push = pool.submit(site.client(proxy.port, stall_s=1.0).push, site.ticket(), source, receipt)
        _until(lambda: proxy.up.num_bytes > MIB)
        proxy.up.bytes_per_s = 0.01
        _until(lambda: proxy.num_connections > 1)
        proxy.up.bytes_per_s = None
        push.result(timeout=60)
    assert site.delivered() == source.read_bytes()


def test_a_server_that_cannot_be_reached_is_given_up_with_a_clear_error(site: Site):
    source = site.folder / "update"
    receipt = payload(source, MIB)
    with pytest.raises(TransportError, match=r"gave up.*UNAVAILABLE"):
        site.client(free_port(), quiet_s=1.0).push(site.ticket(), source, receipt)
    with pytest.raises(TransportError, match="gave up"):
        site.client(free_port(), deadline_s=1.0).push(site.ticket(), source, receipt)


def test_a_file_that_is_not_what_it_claims_is_refused_at_once(site: Site):
    source = site.folder / "update"
    receipt = payload(source, 2 * MIB)
    payload(source, 2 * MIB, seed=1)
    with pytest.raises(CorruptPayloadError, match="not what is announced"):
        site.client().push(site.ticket(), source, receipt)
    source.write_bytes(b"short")
    with pytest.raises(CorruptPayloadError, match="not what is announced"):
        site.client().push(site.ticket(), source, receipt)
    assert site.delivered() is None


def test_a_state_that_is_not_what_was_announced_is_refused(site: Site):
    source = site.folder / "state"
    receipt = payload(source, 2 * MIB)
    site.server.publish("state", source)
    payload(source, 2 * MIB, seed=1)
    ticket = site.ticket("fetch", state_id="state")
    with pytest.raises(CorruptPayloadError):
        site.client().fetch(ticket, site.folder / "back", receipt)
    assert list(site.folder.glob("back*")) == []


def test_bad_bytes_left_by_an_earlier_fetch_are_thrown_away(site: Site):
    source = site.folder / "state"
    receipt = payload(source, 3 * MIB)
    site.server.publish("state", source)
    (site.folder / f"back.{receipt.digest}.part").write_bytes(b"x" * MIB)
    (site.folder / f"back.{'0' * 32}.part").write_bytes(b"of another state")
    ticket = site.ticket("fetch", state_id="state")
    back = site.client().fetch(ticket, site.folder / "back", receipt)
    assert back.read_bytes() == source.read_bytes()
    assert [path.name for path in site.folder.glob("back*")] == ["back"]


def test_a_state_that_was_never_published_is_named(site: Site):
    receipt = payload(site.folder / "state", 10)
    with pytest.raises(TransportError, match="'nothing' is not published"):
        site.client().fetch(site.ticket("fetch", state_id="nothing"), site.folder / "back", receipt)


def test_thirty_two_sites_push_at_the_same_time(site: Site):
    def push(number: int) -> None:
        source = site.folder / f"update{number}"
        receipt = payload(source, 300_000, seed=number)
        site.client().push(site.ticket(site=f"clinic-{number}"), source, receipt)

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(push, range(32)))
    for number in range(32):
        assert site.delivered(f"clinic-{number}") == (site.folder / f"update{number}").read_bytes()


def test_slow_sites_do_not_hold_up_a_quick_one(site: Site):
    source = site.folder / "update"
    receipt = payload(source, 8 * MIB)
    with ThreadPoolExecutor(24) as pool, ChaosProxy(site.server.port, bytes_per_s=50_000) as proxy:
        stop = threading.Event()
        slow = [
            pool.submit(
                site.client(proxy.port, should_stop=stop.is_set).push, site.ticket(site=f"slow-{n}"), source, receipt
            )
            for n in range(24)
        ]
        _until(lambda: proxy.num_connections == 24 and proxy.up.num_bytes > 24 * 32_000)
        site.client().push(site.ticket(), source, receipt)
        assert not any(push.done() for push in slow)
        stop.set()
        for push in slow:
            with pytest.raises(CancelledError):
                push.result(timeout=60)


def test_more_sites_than_there_is_room_for_take_turns(tmp_path: Path):
    with serving(tmp_path, max_transfers=2, queue_s=0.05) as site, ThreadPoolExecutor(8) as pool:
        source = tmp_path / "update"
        receipt = payload(source, 2 * MIB)
        pushes = [pool.submit(site.client().push, site.ticket(site=f"s{n}"), source, receipt) for n in range(8)]
        for push in pushes:
            push.result(timeout=60)
        assert all(site.delivered(f"s{n}") is not None for n in range(8))


def _serve(folder: Path, key: bytes, pipe) -> None:
    with UpdateServer(Spool(folder), TicketKey(key), RUN, ports="0", insecure=True) as server:
        server.open_round(1)
        pipe.send(server.port)
        pipe.recv()


def test_the_servers_memory_does_not_grow_with_a_push(tmp_path: Path):
    ours, theirs = processes.Pipe()
    server = processes.Process(target=_serve, args=(tmp_path / "spool", bytes(32), theirs))
    server.start()
    site = Site(tmp_path, None, Spool(tmp_path / "spool"), TicketKey(bytes(32)))  # type: ignore[arg-type]
    client = UpdateClient(f"127.0.0.1:{ours.recv()}", insecure=True)
    warm, large = tmp_path / "warm", tmp_path / "large"
    receipts = payload(warm, 4 * MIB), payload(large, 200 * MIB)
    client.push(_ticket(site.key, "warm", 4 * MIB), warm, receipts[0])
    memory = psutil.Process(server.pid).memory_info
    before = peak = memory().rss
    with ThreadPoolExecutor(1) as pool:
        push = pool.submit(client.push, _ticket(site.key, "large", 200 * MIB), large, receipts[1])
        while not push.done():
            peak = max(peak, memory().rss)
            time.sleep(0.005)
        push.result()
    ours.send(None)
    server.join()
    assert (peak - before) / MIB < 40


def _ticket(key: TicketKey, site: str, max_bytes: int) -> str:
    from fedllm.wire.ticket import Ticket

    return key.issue(Ticket(RUN, 1, 1, site, "push", max_bytes, int(time.time()) + 60))


def test_tls_with_the_federations_authority_works_and_a_foreign_one_is_refused(tmp_path: Path):
    ours, foreign = make_certificates(tmp_path / "ours"), make_certificates(tmp_path / "foreign")
    tls = TlsConfig(certificate=ours.certificate, key=ours.key)
    spool = Spool(tmp_path / "spool")
    source = tmp_path / "update"
    receipt = payload(source, 2 * MIB)
    with UpdateServer(spool, TicketKey.generate(), RUN, ports="0", tls=tls) as server:
        server.open_round(1)
        ticket = server.issue(round_=1, site="clinic-a", direction="push", max_bytes=receipt.size, lifetime_s=60)
        with pytest.raises(TransportError, match="TLS failed"):
            UpdateClient(server.address, tls=TlsConfig(ca=foreign.ca)).push(ticket, source, receipt)
        with pytest.raises(TransportError, match="gave up"):
            UpdateClient(server.address, insecure=True, quiet_s=0.5).push(ticket, source, receipt)
        assert spool.receipt(1, "clinic-a") is None
        UpdateClient(server.address, tls=TlsConfig(ca=ours.ca)).push(ticket, source, receipt)
        assert spool.receipt(1, "clinic-a") == receipt


def test_a_server_that_asks_for_client_certificates_serves_only_those_who_have_one(tmp_path: Path):
    ours = make_certificates(tmp_path / "ours")
    spool, source = Spool(tmp_path / "spool"), tmp_path / "update"
    receipt = payload(source, MIB)
    tls = TlsConfig(ca=ours.ca, certificate=ours.certificate, key=ours.key)
    with UpdateServer(spool, TicketKey.generate(), RUN, ports="0", tls=tls) as server:
        server.open_round(1)
        ticket = server.issue(round_=1, site="clinic-a", direction="push", max_bytes=receipt.size, lifetime_s=60)
        with pytest.raises(TransportError):
            UpdateClient(server.address, tls=TlsConfig(ca=ours.ca), quiet_s=0.5).push(ticket, source, receipt)
        UpdateClient(server.address, tls=tls).push(ticket, source, receipt)
        assert spool.receipt(1, "clinic-a") == receipt


def test_plaintext_needs_an_explicit_word_at_both_ends(tmp_path: Path):
    with pytest.raises(ConfigError, match="no TLS is configured"):
        UpdateServer(Spool(tmp_path), TicketKey.generate(), RUN, ports="0")
    with pytest.raises(ConfigError, match="no TLS is configured"):
        UpdateClient("127.0.0.1:1")
    with pytest.raises(ConfigError, match="both set"):
        UpdateClient("127.0.0.1:1", tls=TlsConfig(), insecure=True)


def test_the_first_free_port_is_taken_and_a_full_range_is_named(tmp_path: Path):
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(1)]
    port = taken[0].getsockname()[1]
    with pytest.raises(TransportError, match=rf"no free port; expected one of {port}-{port}"):
        UpdateServer(Spool(tmp_path), TicketKey.generate(), RUN, ports=str(port), insecure=True)
    with UpdateServer(Spool(tmp_path), TicketKey.generate(), RUN, ports=f"{port}-{port + 20}", insecure=True) as one:
        assert port < one.port <= port + 20
        with pytest.raises(TransportError, match="no free port"):
            UpdateServer(Spool(tmp_path), TicketKey.generate(), RUN, ports=str(one.port), insecure=True)
    taken[0].close()


def _until(condition, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
