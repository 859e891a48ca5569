"""What the doctor says of the way to the server, tried against real servers on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.supercore.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

from client_app.doctor import flower
from client_app.doctor.address import Address
from client_app.doctor.finding import Finding, Status, worst
from client_app.doctor.flower import Drift, drift, examine_clock, examine_flower
from client_app.doctor.updates import examine_updates
from fedllm.errors import ConfigError
from fedllm.wire.server import UpdateServer
from fedllm.wire.spool import Spool
from fedllm.wire.ticket import TicketKey
from fedllm.wire.tls import TlsConfig
from tests.doctor_tools import Authority, Hub, by_check, make_case, serving_http
from tests.free_ports import free_port
from tests.wire_tools import Certificates, make_certificates


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def update_port(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[int]:
    tls = TlsConfig(certificate=certificates.certificate, key=certificates.key)
    spool = Spool(tmp_path_factory.mktemp("spool"))
    with UpdateServer(spool, TicketKey.generate(), "a-run", ports="0", tls=tls) as server:
        server.open_round(1)
        yield server.port


def at_hub(folder: Path, hub: Hub, certificates: Certificates, transport: str = "") -> dict[str, Finding]:
    transport = transport or f'ca = "{certificates.ca}"'
    with serving_http(hub, certificates) as port:
        return by_check(examine_flower(make_case(folder, transport, f"127.0.0.1:{port}")))


def test_a_hub_that_serves_sites_is_in_order_but_for_its_certificate_of_one_day(
    tmp_path: Path, certificates: Certificates
) -> None:
    found = at_hub(tmp_path, Hub(), certificates)
    assert found.pop("server").status is Status.WARNING  # it ends soon
    assert set(found) == {"flower", "clock", "fleet"}
    assert worst(found.values()) is Status.OK
    assert abs(float(found["clock"].facts["ahead_s"])) < 2


@pytest.mark.parametrize(
    ("hub_is_ahead_s", "status"), [(-3600, "failure"), (-20, "failure"), (200, "warning"), (3600, "failure")]
)
def test_a_clock_that_differs_from_the_servers_is_noticed(
    tmp_path: Path, certificates: Certificates, hub_is_ahead_s: float, status: str
) -> None:
    finding = at_hub(tmp_path, Hub(clock_s=hub_is_ahead_s), certificates)["clock"]
    assert finding.status == status
    assert abs(float(finding.facts["ahead_s"]) + hub_is_ahead_s) < 3
    assert "NTP" in finding.fix


def test_the_limits_on_a_clock_are_flowers_own() -> None:
    assert flower.MAX_AHEAD_S == SYSTEM_TIME_TOLERANCE
    assert flower.MAX_BEHIND_S == SYSTEM_TIME_TOLERANCE + TIMESTAMP_TOLERANCE


@pytest.mark.parametrize(
    ("ahead_s", "status"),
    [(0, "ok"), (4, "warning"), (7, "failure"), (-50, "ok"), (-100, "warning"), (-310, "failure")],
)
def test_a_clock_is_judged_by_the_limits(ahead_s: float, status: str) -> None:
    assert examine_clock(Drift(ahead_s, 0.6)).status == status


def test_a_date_that_is_none_is_a_warning_and_not_an_error() -> None:
    assert drift("yesterday", 0, 0) is None
    assert examine_clock(None).status is Status.WARNING


def test_half_a_second_is_the_least_that_a_date_of_whole_seconds_leaves_open() -> None:
    found = drift("Thu, 01 Jan 1970 00:00:10 GMT", 9.0, 12.0)
    assert found == Drift(ahead_s=0.0, within_s=2.0)


@pytest.mark.parametrize(
    ("hub", "check", "words"),
    [
        (Hub(health=502), "flower", "behind it does not"),
        (Hub(health=404), "flower", "no SuperLink"),
        (Hub(fleet=404), "fleet", "HTTP 404"),
    ],
)
def test_a_hub_that_lacks_something_fails_there(
    tmp_path: Path, certificates: Certificates, hub: Hub, check: str, words: str
) -> None:
    finding = at_hub(tmp_path, hub, certificates)[check]
    assert finding.status is Status.FAILURE
    assert words in finding.message


def test_a_hub_on_which_sites_could_start_runs_is_warned_of(tmp_path: Path, certificates: Certificates) -> None:
    assert at_hub(tmp_path, Hub(control=405), certificates)["control"].status is Status.WARNING


def test_a_foreign_authority_fails_before_anything_is_asked(tmp_path: Path, certificates: Certificates) -> None:
    (tmp_path / "other.crt").write_bytes(Authority.make("another").pem())
    found = at_hub(tmp_path, Hub(), certificates, 'ca = "other.crt"')
    assert set(found) == {"server"}
    assert found["server"].status is Status.FAILURE


def test_another_host_name_fails_with_the_names_of_the_certificate(tmp_path: Path) -> None:
    authority = Authority.make()
    certificate, key = authority.sign("hub", host="hub.example.org")
    files = Certificates(tmp_path / "ca.crt", tmp_path / "hub.crt", tmp_path / "hub.key")
    for path, content in zip(
        (files.ca, files.certificate, files.key), (authority.pem(), certificate, key), strict=True
    ):
        path.write_bytes(content)
    finding = at_hub(tmp_path, Hub(), files)["server"]
    assert finding.status is Status.FAILURE
    assert "hub.example.org" in finding.message


def test_a_port_where_nobody_listens_and_a_name_that_nobody_has_fail_differently(
    tmp_path: Path, certificates: Certificates
) -> None:
    transport = f'ca = "{certificates.ca}"'
    (refused,) = examine_flower(make_case(tmp_path, transport, f"127.0.0.1:{free_port()}"))
    (unknown,) = examine_flower(make_case(tmp_path, transport, "no-such-host.invalid:443"))
    assert "nobody listens" in refused.message
    assert refused.status is unknown.status is Status.FAILURE
    assert "DNS" in unknown.fix


def test_a_port_that_speaks_no_tls_fails(tmp_path: Path, certificates: Certificates) -> None:
    with serving_http(Hub()) as port:
        (finding,) = examine_flower(make_case(tmp_path, f'ca = "{certificates.ca}"', f"127.0.0.1:{port}"))
    assert finding.status is Status.FAILURE
    assert "TLS" in finding.message


def test_plaintext_is_asked_where_the_site_allows_it(tmp_path: Path) -> None:
    with serving_http(Hub()) as port:
        found = by_check(examine_flower(make_case(tmp_path, "insecure = true", f"127.0.0.1:{port}")))
    assert worst(found.values()) is Status.OK


def test_an_unknown_address_is_a_warning(tmp_path: Path) -> None:
    case = make_case(tmp_path, "")
    assert [finding.status for finding in (*examine_flower(case), *examine_updates(case))] == [Status.WARNING] * 2


@pytest.mark.parametrize("text", ["", "host", "host:", ":80", "host:0", "host:65536", "host:http"])
def test_an_address_without_host_or_port_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        Address.parse(text)


@pytest.mark.parametrize("text", ["hub.example.org:443", "10.0.0.1:9200", "[::1]:80"])
def test_an_address_is_written_as_it_was_read(text: str) -> None:
    assert str(Address.parse(text)) == text


def test_the_update_servers_refusal_of_a_nonsense_ticket_proves_the_way_to_it(
    tmp_path: Path, certificates: Certificates, update_port: int
) -> None:
    transport = f'ca = "{certificates.ca}"\naddress = "127.0.0.1:{update_port}"'
    found = list(examine_updates(make_case(tmp_path, transport)))
    assert found[-1].status is Status.OK
    assert "refused a ticket" in found[-1].message


def test_an_update_server_of_another_authority_fails(tmp_path: Path, update_port: int) -> None:
    (tmp_path / "other.crt").write_bytes(Authority.make("another").pem())
    transport = f'ca = "other.crt"\naddress = "127.0.0.1:{update_port}"'
    (finding,) = examine_updates(make_case(tmp_path, transport))
    assert finding.status is Status.FAILURE


@pytest.mark.timeout(60)  # it does not wait for what will not come
@pytest.mark.parametrize(("health", "status"), [(404, "failure")])
def test_a_server_without_the_update_service_fails(
    tmp_path: Path, certificates: Certificates, health: int, status: str
) -> None:
    with serving_http(Hub(health=health), certificates) as port:
        transport = f'ca = "{certificates.ca}"\naddress = "127.0.0.1:{port}"'
        found = list(examine_updates(make_case(tmp_path, transport)))
    assert found[-1].status == status
