"""What the doctor says of Python, packages, the device and the command line's ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from client_app.doctor.finding import Finding, Status, failure, ok, warning, worst
from client_app.doctor.folders import examine_privacy, examine_room
from client_app.doctor.hardware import examine_device, examine_product, judge_product, product_error
from client_app.doctor.software import examine_packages, examine_python, examine_software, project_requirements
from fedllm.cli.main import main
from fedllm.model.spec import BaseSpec
from tests.doctor_tools import make_kit

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str]:
        status = main(["site", "doctor", *map(str, arguments)])
        return status, capsys.readouterr().out

    return run


def test_this_environment_has_what_the_project_asks_for() -> None:
    assert worst(examine_software()) is Status.OK
    python, requirements = project_requirements()
    names = {requirement.name for requirement in requirements}
    assert python.startswith(">=3.11")
    assert {"flwr", "grpcio", "torch", "bitsandbytes"} <= names  # of the extra, and of the one that it includes
    assert "fedllm" not in names


def test_a_package_that_is_missing_or_of_another_release_is_named_with_both() -> None:
    asked = [Requirement("numpy<1"), Requirement("no-such-package>=2"), Requirement("pydantic>=2")]
    wrong, missing, right = examine_packages(asked)
    assert wrong.status is missing.status is Status.FAILURE
    assert f"numpy<1 is needed; {metadata.version('numpy')} is installed" in wrong.message
    assert "not installed" in missing.message
    assert "pip install" in missing.fix
    assert right.status is Status.OK


@pytest.mark.parametrize(("found", "status"), [("3.10.4", "failure"), ("3.11.0", "ok"), ("3.14.0", "failure")])
def test_python_is_compared_with_what_is_asked(found: str, status: str) -> None:
    assert examine_python(">=3.11,<3.14", found).status == status


def test_the_worst_finding_counts() -> None:
    fine, doubtful, bad = ok("a", ""), warning("b", "", ""), failure("c", "", "")
    assert worst([]) is worst([fine]) is Status.OK
    assert worst([doubtful, fine]) is Status.WARNING
    assert worst([doubtful, bad, fine]) is Status.FAILURE


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_product_comes_out_right_on_this_processor(quantization: str) -> None:
    finding = examine_product(BaseSpec.model_validate({"quantization": quantization}), "cpu")
    assert finding.status is Status.OK
    assert 0 < float(finding.facts["error"]) < (0.12 if quantization == "nf4" else 0.02)


def test_a_product_that_is_wrong_would_be_noticed() -> None:
    right = product_error(BaseSpec(), "cpu")
    assert judge_product(right, "nf4", "cpu").status is Status.OK
    assert judge_product(10 * right, "nf4", "cpu").status is Status.FAILURE
    assert judge_product(float("nan"), "nf4", "cpu").status is Status.FAILURE


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_fails_and_none_at_all_is_a_warning() -> None:
    assert examine_device("cuda:0").status is Status.FAILURE
    assert examine_product(BaseSpec(), "cuda:0").status is Status.FAILURE
    assert examine_device("auto").status is Status.WARNING
    assert examine_device("cpu").status is Status.OK


def test_room_is_compared_with_the_need(tmp_path: Path) -> None:
    deep = tmp_path / "not" / "yet"
    assert examine_room("cache", deep, 1000, "").status is Status.OK
    assert examine_room("cache", deep, 1 << 60, "Free some.").status is Status.FAILURE
    assert not deep.exists()


def test_a_folder_that_cannot_be_written_fails() -> None:
    assert "cannot be written" in examine_room("cache", Path("/proc/self"), 0, "").message


@pytest.mark.parametrize(("mode", "num_findings"), [(0o700, 0), (0o750, 1), (0o755, 1)])
def test_a_state_folder_that_others_may_look_into_is_warned_of(tmp_path: Path, mode: int, num_findings: int) -> None:
    tmp_path.chmod(mode)
    findings: list[Finding] = list(examine_privacy("state", tmp_path))
    assert len(findings) == num_findings
    assert all(finding.fix == f"chmod 700 {tmp_path}" for finding in findings)


@pytest.mark.parametrize(
    "text", ["", "[site]\n", "not toml", '[site]\nname="a"\n[data]\nsource="file:a"\nsuorce="b"\n']
)
def test_a_wrong_site_file_is_the_only_finding(doctor: Run, tmp_path: Path, text: str) -> None:
    (tmp_path / "site.toml").write_text(text)
    status, output = doctor("--site", tmp_path / "site.toml", "--json")
    (finding,) = json.loads(output)["findings"]
    assert (status, finding["check"], finding["status"]) == (1, "site file", "failure")


def test_a_run_config_with_an_unknown_key_is_named(doctor: Run, tmp_path: Path) -> None:
    site = make_kit(tmp_path)
    (tmp_path / "run.toml").write_text("train.bach_size = 1\n")
    status, output = doctor("--site", site, "--run-config", tmp_path / "run.toml")
    assert status == 1
    assert "train.batch_size" in output
    assert "1 failure" in output
