"""``fedllm site audit``: readable lines, a verdict, and an exit status that tells."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from client_app.audit.notes import Notes, audit_log
from client_app.site import SiteConfig
from fedllm.cli.main import main
from fedllm.errors import PolicyError
from fedllm.messages import EvaluateReport, Score
from fedllm.wire.transport import Envelope
from tests.owned_sites import owned
from tests.unit.test_policy_rules import hello, train


@pytest.fixture
def owner(tmp_path: Path) -> SiteConfig:
    """Return a site that has greeted, trained and refused."""
    owner = owned(tmp_path)
    (tmp_path / "clinic.toml").rename(tmp_path / "site.toml")
    payload = tmp_path / "update"
    payload.write_bytes(b"x" * 2048)
    asked = train(3, num_sites=4, adapter__rank=8)
    Notes(owner, asked).received(Envelope({"transport": "grpc"}), "fedllm/fedllm")
    Notes(owner, asked).sending(Envelope({"transport": "grpc", "address": "server", "port": 9200}), payload)
    score = Score(loss=1.25, accuracy=0.5, num_tokens=100, num_examples=10)
    Notes(owner, asked).sent(EvaluateReport(site="clinic", round=3, score=score, seconds=1.0), None)
    Notes(owner, hello("other\x1b[31m")).failed(PolicyError("not here"), "not here")
    return owner


def test_the_log_is_shown_in_readable_lines_and_ends_with_its_last_hash(
    owner: SiteConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["site", "audit", str(owner.home)]) == 0
    shown = capsys.readouterr().out
    first, second, third, fourth, verdict, warning = shown.splitlines()
    assert "received" in first
    assert "study-7 train round 3; 8; 4 sites" in first
    assert "sending" in second
    assert "2.05 kB over grpc to server; sha256 " in second
    assert "evaluated; score.accuracy 0.5; score.loss 1.25; score.num_examples 10; score.num_tokens 100" in third
    assert "refused" in fourth
    assert "PolicyError: not here" in fourth
    assert "\x1b" not in shown, "a run's name cannot steer the terminal"
    assert verdict.startswith("all 4 lines fit; the last is record 4, hash ")
    assert audit_log(owner).append("received").number == 5
    assert "note this hash elsewhere" in warning


def test_a_change_gives_status_1_and_the_first_bad_line(owner: SiteConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["site", "audit", "--verify", str(owner.home / "site.toml")]) == 0
    assert capsys.readouterr().out.startswith("all 4 lines fit")
    [file] = audit_log(owner).files
    file.write_bytes(file.read_bytes().replace(b'"loss":1.25', b'"loss":1.24'))
    assert main(["site", "audit", "--verify", str(owner.home)]) == 1
    assert "line 3 (audit-000001.jsonl:3) does not fit: it is not as it was written" in capsys.readouterr().out
    assert main(["site", "audit", str(owner.home)]) == 1
    capsys.readouterr()
    assert main(["site", "audit", "--json", str(owner.home)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert found["problem"]["line"] == 3
    assert len(found["records"]) == 3


def test_since_leaves_out_what_is_older(owner: SiteConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["site", "audit", "--since", "2999-01-01", "--json", str(owner.home)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["records"], found["last"]["number"]) == ([], 4)
    assert main(["site", "audit", "--since", "2001-01-01T08:00", "--json", str(owner.home)]) == 0
    assert len(json.loads(capsys.readouterr().out)["records"]) == 4


def test_a_log_that_is_not_there_is_not_called_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    owned(tmp_path)
    assert main(["site", "audit", "--verify", str(tmp_path / "clinic.toml")]) == 1
    assert "there is no audit log" in capsys.readouterr().out
    assert main(["site", "audit", str(tmp_path / "none.toml")]) == 2


def test_looking_at_the_log_loads_no_torch(owner: SiteConfig) -> None:
    code = "import sys; from fedllm.cli.main import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    arguments = [sys.executable, "-c", code, "site", "audit", str(owner.home)]
    assert subprocess.run(arguments, capture_output=True, check=False).returncode == 0
