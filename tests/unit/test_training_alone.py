"""Sites that train for themselves beside a federation, whatever the federation's adapter is made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny_federation import run_tiny, tiny_home

__all__ = ["tiny_home"]


@pytest.mark.parametrize("strategy", ["fedavg", "fedex", "ravan"])
def test_every_site_trains_alone_and_for_itself_under_any_kind_of_adapter(strategy: str, tiny_home: Path) -> None:
    settings = {"strategy.name": strategy, "adapter.rank": 8, "num_rounds": 1}
    folder = run_tiny(tiny_home, **settings, **{"evaluation.local_only": True, "evaluation.personal_steps": 2})
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    [before, _] = [row for row in rows if row["event"] == "evaluation"]
    for kind in ("local_only", "personalised"):
        [event] = [row for row in rows if row["event"] == kind]
        assert event["sites"].keys() == {"site-0", "site-1"}
        assert event["loss"] != before["loss"], "something was trained"
