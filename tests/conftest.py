"""Which tests share a process, and which begin first, where several processes share the work (`pytest -n 3`)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

LANES = {
    "test_kill_and_resume.py": "killed servers",
    "test_attacked_run.py": "killed servers",
    "test_wrong_input.py": "killed servers",
    "test_mixed_ranks.py": "killed servers",
    "test_kill_and_stream.py": "broken streams",
    "test_stock_app.py": "broken streams",
    "test_site_service.py": "broken streams",
    "test_deployed_kits.py": "broken streams",
}
"""Files with federations of their own: those of one lane run one after the other, in one process.

They take minutes and mostly wait, so they begin first and the other tests fill the cores meanwhile. More than two at a time
are too many for two cores: with three lanes the whole took longer, and single federations up to four times as long.
"""

os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "kernels"))
"""Federations of tests have a cache of their own each; kernels need not be compiled for every one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the long waits begin first."""
    items.sort(key=lambda item: item.path.name not in LANES)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    """Hand out whole lanes and whole files, so that what a file's tests share is made once."""
    return Lanes(config, log)


class Lanes(LoadScopeScheduling):
    """Hands out tests lane by lane, and otherwise file by file, in the order in which they were collected."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::", 1)[0]
        return LANES.get(path.rsplit("/", 1)[-1], path)
