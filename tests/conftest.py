"""How the tests run: which share a process and which begin first (`pytest -n 3`), and with what examples."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

FEDERATIONS = {
    "test_kill_and_resume.py": "long",
    "test_attacked_run.py": "short",
    "test_mixed_ranks.py": "short",
    "test_wrong_input.py": "short",
    "test_stock_app.py": "short",
    "test_site_service.py": "short",
    "test_kill_and_stream.py": "long",
    "test_deployed_kits.py": "long",
}
"""Files with federations of their own: those of one share run one after the other, in one process, in this order.

They take minutes and partly wait, so they begin first and the other tests fill the cores meanwhile. More at a time are too
many for two cores: Flower takes work back from a program that needs more than 30 s to start. The largest comes last, when
the other tests have ended.
"""

os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "kernels"))
"""Federations of tests have a cache of their own each; kernels need not be compiled for every one."""

settings.register_profile("suite", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile("suite")
"""Equal sources are tested with equal examples; `make fuzz` looks for new ones."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the long waits begin first."""
    items.sort(key=lambda item: _place(item.path.name))


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    """Hand out the federations and whole files, so that what a file's tests share is made once."""
    return Shares(config, log)


def _place(name: str) -> int:
    return list(FEDERATIONS).index(name) if name in FEDERATIONS else len(FEDERATIONS)


class Shares(LoadScopeScheduling):
    """Hands out the federations' shares, and then other tests file by file, in the order in which they were collected."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::", 1)[0]
        return FEDERATIONS.get(path.rsplit("/", 1)[-1], path)
