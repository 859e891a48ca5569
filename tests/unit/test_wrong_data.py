"""Every kind of wrong data or model is refused before anything is trained, with each site's own reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedllm.errors import QuorumError
from tests.tiny_federation import run_tiny

ROW = {"prompt": "hello", "completion": "hi"}
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "missing file": ({"data.source": "file:absent.jsonl"}, ["DataError", "absent.jsonl"]),
    "unknown shape": ({"data.source": "file:odd.jsonl"}, ["DataError", "odd.jsonl", "column"]),
    "more sites than examples": (
        {"data.source": "file:one.jsonl", "simulation.partitioner": "iid"},
        ["DataError", "at least 2 examples for each of 2 sites", "found 1"],
    ),
    "nothing to train on": ({"data.max_length": 8}, ["DataError", "max_length"]),
    "missing base": ({"model.source": "path:absent"}, ["ModelError", "absent"]),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_ends_a_run_before_training(tmp_path: Path, case: str) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps(ROW))
    (tmp_path / "odd.jsonl").write_text('{"column": 1}')
    changes, words = CASES[case]
    with pytest.raises(QuorumError, match="too few sites joined") as refusal:
        run_tiny(tmp_path, **changes)
    for word in ["site-0", "site-1", *words]:
        assert word in str(refusal.value)
