"""A site as a job of a real Slurm of one node: told before its time ends, queued again, connected again, and cancelled."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from client_app.service.control import site_status
from tests.free_ports import free_ports
from tests.integration.test_site_service import _wait_until, kit  # noqa: F401
from tests.one_node_slurm import can_run, one_node

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_run(), reason="no Slurm (Debian: apt-get install slurm-wlm munge), or not root"),
]


@pytest.fixture(autouse=True)
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm" / "slurm.conf"))
    with one_node(tmp_path / "slurm", *free_ports(2)):
        yield


def state_of(job: str) -> dict[str, str]:
    said = subprocess.run(["scontrol", "show", "job", job], check=True, capture_output=True, text=True).stdout
    return dict(re.findall(r"(\w+)=(\S+)", said))


def test_a_job_is_queued_again_before_its_time_ends_and_ends_for_good_when_cancelled(kit: Path):  # noqa: F811
    """The time limit is the shortest that Slurm has; the signal may come up to a minute early."""
    here = ["--time=2", "--signal=B:USR1@60", "--cpus-per-task=1", "--mem=1G", "--parsable", "fedllm-site.sbatch"]
    job = subprocess.run(["sbatch", *here], cwd=kit, check=True, capture_output=True, text=True).stdout.strip()
    log = kit / f"slurm-{job}.log"
    _wait_until(lambda: site_status(kit).phase == "connected", 60, kit)
    node = site_status(kit).node_id
    assert state_of(job)["JobState"] == "RUNNING"

    _wait_until(lambda: state_of(job)["Restarts"] == "1", 120, kit)
    assert site_status(kit).sentence() == "not running"
    _wait_until(lambda: state_of(job)["JobState"] == "PENDING", 60, kit)
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)
    _wait_until(lambda: site_status(kit).phase == "connected", 120, kit)
    assert site_status(kit).node_id == node
    assert re.findall(r"start (\d) of job", log.read_text()) == ["1", "2"]

    subprocess.run(["scancel", job], check=True)
    _wait_until(lambda: site_status(kit).sentence() == "not running", 60, kit)
    _wait_until(lambda: state_of(job)["JobState"] == "CANCELLED", 60, kit)
    assert state_of(job)["Restarts"] == "1"
    assert log.read_text().count("[service] ends") == 2
