"""The small parts of the update stream, each alone."""

from __future__ import annotations

import os
import random
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest
import xxhash

from fedllm.errors import CancelledError, ConfigError, CorruptPayloadError, OversizedPayloadError, TransportError
from fedllm.ports import free_ports, parse_ports
from fedllm.wire import generate
from fedllm.wire import patience as patience_module
from fedllm.wire.digest import CHUNK_BYTES, Digest, checksum, digest_bytes, digest_file, survey_file
from fedllm.wire.ledger import Ledger
from fedllm.wire.part import Part, Receipt
from fedllm.wire.patience import Patience
from fedllm.wire.spool import Spool
from fedllm.wire.status import METADATA_KEY, Reason, RefusedError, judge
from fedllm.wire.tls import TlsConfig, channel_credentials, server_credentials
from tests.wire_tools import make_certificates


def test_generating_the_module_again_changes_nothing():
    for path, text in generate.generate().items():
        assert path.read_text() == text


def test_the_generated_module_does_not_ask_for_one_version_of_protobuf():
    """A runtime that refused the module would fail at import; the pure Python one reads the same module."""
    code = "from fedllm.wire import updates_pb2 as pb; print(len(pb.Chunk(data=b'x').SerializeToString()))"
    environment = dict(os.environ, PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION="python")
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "3"
    assert "runtime_version" not in generate.GENERATED[0].read_text()


@pytest.mark.parametrize("size", [0, 3, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_a_digest_is_of_the_checksums_of_the_blocks(size: int, tmp_path: Path):
    data = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(data)
    blocks = [data[start : start + CHUNK_BYTES] for start in range(0, size, CHUNK_BYTES)]
    known = xxhash.xxh3_128(b"".join(xxhash.xxh3_64_digest(block) for block in blocks)).hexdigest()
    assert digest_bytes(data) == digest_file(tmp_path / "file") == known
    assert survey_file(tmp_path / "file") == (known, [checksum(block) for block in blocks])


def test_a_digest_does_not_depend_on_the_pieces():
    source = random.Random(1)
    data = source.randbytes(2 * CHUNK_BYTES + 77)
    for _ in range(20):
        digest, start = Digest(), 0
        while start < len(data):
            piece = data[start : start + source.choice([1000, CHUNK_BYTES, 2 * CHUNK_BYTES, 300_000])]
            digest.update(piece, checksum(piece) if source.random() < 0.5 else None)
            start += len(piece)
        assert digest.hexdigest() == digest_bytes(data)


@pytest.mark.parametrize(("size", "digest"), [(-1, "0" * 32), (1, ""), (1, "0" * 31), (1, "G" * 32), (1, "A" * 32)])
def test_a_receipt_that_names_nothing_is_refused(size: int, digest: str):
    with pytest.raises(TransportError, match="announced wrongly"):
        Receipt(size, digest)


def _receipt(data: bytes) -> Receipt:
    return Receipt(len(data), digest_bytes(data))


def _nowhere(_: Path) -> None:
    """Deliver by leaving the file where it is."""


def _never(_: Path) -> None:
    pytest.fail("delivered")


def test_a_part_takes_no_byte_more_than_announced(tmp_path: Path):
    with Part(tmp_path / "part", _receipt(b"abc"), _nowhere) as part:
        part.append(b"ab")
        with pytest.raises(OversizedPayloadError, match="expected 3 bytes"):
            part.append(b"cd")
    assert part.size == 2
    assert (tmp_path / "part").read_bytes() == b"ab"


def test_a_part_longer_than_announced_is_begun_anew(tmp_path: Path):
    (tmp_path / "part").write_bytes(b"much too long")
    assert Part(tmp_path / "part", _receipt(b"abc"), _nowhere).size == 0


def test_a_part_torn_by_a_crash_is_found_out_at_the_end(tmp_path: Path):
    (tmp_path / "part").write_bytes(b"a\0")
    part = Part(tmp_path / "part", _receipt(b"abc"), _never)
    part.append(b"c")
    with pytest.raises(CorruptPayloadError):
        part.finish()
    assert not (tmp_path / "part").exists()


def test_a_closed_part_cannot_be_written_or_finished(tmp_path: Path):
    part = Part(tmp_path / "part", _receipt(b"abc"), _never)
    part.append(b"abc")
    part.close()
    for action in (lambda: part.append(b""), part.finish, part.rewind):
        with pytest.raises(TransportError, match="superseded"):
            action()
    assert (tmp_path / "part").read_bytes() == b"abc"


def test_a_full_disk_is_named(tmp_path: Path):
    (tmp_path / "part").symlink_to("/dev/full")
    with (
        Part(tmp_path / "part", _receipt(b"abc"), _nowhere) as part,
        pytest.raises(TransportError, match=r"the disk is full.*No space left.*Free disk space") as caught,
    ):
        part.append(b"abc")
    assert isinstance(caught.value.__cause__, OSError)
    assert part.size == 0


def test_a_write_that_fails_half_way_is_undone_and_can_be_repeated(tmp_path: Path):
    part = Part(tmp_path / "part", _receipt(b"abcdef"), _nowhere)
    part.append(b"ab")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))
    try:
        with pytest.raises(TransportError, match="File too large"):
            part.append(b"cdef")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "part").read_bytes() == b"ab"
    part.append(b"cdef")
    part.finish()


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TransportError, match=rf"cannot be read or written.*{re.escape(str(tmp_path))}.*permissions"):
        Spool(tmp_path / "file" / "spool")


def test_a_spool_keeps_within_its_bound(tmp_path: Path):
    spool = Spool(tmp_path, max_bytes=1000)
    spool.store(1, "a", bytes(600), _receipt(bytes(600)))
    with pytest.raises(TransportError, match=r"no room.*expected 600 bytes free"):
        spool.begin(1, "b", _receipt(bytes(600)))
    promised = spool.begin(1, "c", _receipt(bytes(250)))
    with pytest.raises(TransportError, match="no room"):
        spool.begin(1, "d", _receipt(bytes(150)))
    assert promised is not None
    promised.close()
    assert spool.begin(1, "d", _receipt(bytes(150))) is not None


def test_a_spool_refuses_what_the_disk_cannot_hold(tmp_path: Path):
    with pytest.raises(TransportError, match="no room"):
        Spool(tmp_path).begin(1, "a", Receipt(1 << 60, "0" * 32))


def test_a_new_announcement_discards_the_part_of_the_old_one_and_of_nobody_else(tmp_path: Path):
    spool = Spool(tmp_path)
    for site in ("a", "a@b", "a-b"):
        part = spool.begin(1, site, _receipt(b"old"))
        assert part is not None
        part.append(b"ol")
    assert spool.begin(1, "a", _receipt(b"new")) is not None
    assert [spool.held(1, site, _receipt(b"old")) for site in ("a", "a@b", "a-b")] == [0, 2, 2]


def test_two_pushes_of_a_site_do_not_write_into_one_another(tmp_path: Path):
    spool, data = Spool(tmp_path), os.urandom(64_000)
    older = spool.begin(1, "a", _receipt(data))
    assert older is not None
    older.append(data[:1000])
    newer = spool.begin(1, "a", _receipt(data))
    assert newer is not None
    with pytest.raises(TransportError, match="superseded"):
        older.append(data[1000:2000])
    newer.append(data[1000:])
    newer.finish()
    assert spool.payload_path(1, "a").read_bytes() == data


def test_discarding_a_round_touches_no_other_round(tmp_path: Path):
    spool = Spool(tmp_path)
    for round_ in (1, 11):
        spool.store(round_, "a", b"whole", _receipt(b"whole"))
        part = spool.begin(round_, "b", _receipt(b"half"))
        assert part is not None
        part.append(b"ha")
    spool.discard_round(1)
    assert spool.receipt(1, "a") is None
    assert spool.receipt(11, "a") == _receipt(b"whole")
    assert [spool.held(round_, "b", _receipt(b"half")) for round_ in (1, 11)] == [0, 2]


def test_a_ledger_remembers_across_a_restart(tmp_path: Path):
    ledger = Ledger(tmp_path)
    assert [ledger.attempt(3), ledger.open_round(3), ledger.open_round(3), ledger.open_round(4)] == [0, 1, 2, 1]
    ledger.spend(3, "ab")
    again = Ledger(tmp_path)
    assert again.attempt(3) == 2
    assert [again.is_spent(3, "ab"), again.is_spent(3, "cd"), again.is_spent(4, "ab")] == [True, False, False]
    again.open_round(3)
    assert not again.is_spent(3, "ab")


@pytest.mark.parametrize(
    ("text", "first", "last"), [("9200-9299", 9200, 9299), ("9200", 9200, 9200), (" 1-65535 ", 1, 65535), ("0", 0, 0)]
)
def test_ranges_of_ports_are_inclusive(text: str, first: int, last: int):
    ports = parse_ports(text)
    assert (ports[0], ports[-1]) == (first, last)


@pytest.mark.parametrize("text", ["", "a", "9299-9200", "0-10", "1-65536", "9200-", "-1", "9200,9201"])
def test_ranges_of_ports_that_make_no_sense_are_refused(text: str):
    with pytest.raises(ConfigError, match="a range such as 9200-9299"):
        parse_ports(text)


def test_port_zero_is_left_to_the_system():
    assert list(free_ports("127.0.0.1", range(1))) == [0]


def test_certificates_that_are_missing_are_named(tmp_path: Path):
    files = make_certificates(tmp_path)
    with pytest.raises(ConfigError, match="has no certificate"):
        server_credentials(TlsConfig(ca=files.ca), insecure=False)
    for credentials in (server_credentials, channel_credentials):
        with pytest.raises(ConfigError, match=r"absent\.pem"):
            credentials(TlsConfig(files.ca, tmp_path / "absent.pem", files.key), insecure=False)


def test_patience_ends_without_progress_but_not_while_bytes_move():
    patience = Patience(deadline_s=60, quiet_s=0.3, should_stop=lambda: False)
    error = TransportError("the cause")
    for _ in range(5):
        patience.progressed()
        patience.pause(error)
    with pytest.raises(TransportError, match=r"gave up.*the cause"):
        _pause_often(patience, error)


def _pause_often(patience: Patience, error: TransportError) -> None:
    for _ in range(10):
        patience.pause(error)


def test_patience_ends_at_once_when_the_caller_wants_to_stop():
    stop = threading.Event()
    patience = Patience(deadline_s=60, quiet_s=60, should_stop=stop.is_set)
    stop.set()
    with pytest.raises(CancelledError):
        patience.pause(TransportError("a cause"))


class _Failed(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, reason: str | None = None, details: str = "said so.") -> None:
        self._code, self._reason, self._details = code, reason, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self):
        return ((METADATA_KEY, self._reason),) if self._reason else None


@pytest.mark.parametrize("reason", list(Reason))
def test_a_reason_decides_the_error_and_whether_to_try_again(reason: Reason):
    verdict = judge(_Failed(RefusedError(reason, "").code, reason.value), "host:1")
    assert verdict.reason is reason
    assert verdict.is_retryable == (reason in {Reason.CORRUPT, Reason.OUT_OF_STEP, Reason.BUSY, Reason.STALLED})
    assert str(verdict.error) == "said so; in host:1."


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_an_error_without_a_reason_is_the_connections(code: grpc.StatusCode):
    verdict = judge(_Failed(code), "host:1")
    final = {"UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED", "NOT_FOUND", "INVALID_ARGUMENT", "ABORTED"}
    final |= {"OK", "ALREADY_EXISTS", "FAILED_PRECONDITION", "OUT_OF_RANGE"}
    assert verdict.is_retryable == (code.name not in final)
    assert type(verdict.error) is TransportError
    assert verdict.reason is None


def test_an_unknown_reason_of_a_newer_server_is_no_reason():
    assert judge(_Failed(grpc.StatusCode.ABORTED, "brand-new"), "host:1").reason is None


def test_bytes_that_stay_corrupt_are_given_up_and_other_failures_do_not_count(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patience_module, "FIRST_PAUSE_S", 1e-6)
    patience, corrupt = Patience(60.0, 60.0, lambda: False), CorruptPayloadError("corrupt")
    for _ in range(2):
        for _ in range(patience_module.MAX_CORRUPT):
            patience.pause(TransportError("no connection"))
            patience.pause(corrupt)
        patience.progressed()
    for _ in range(patience_module.MAX_CORRUPT):
        patience.pause(corrupt)
    with pytest.raises(CorruptPayloadError):
        patience.pause(corrupt)
