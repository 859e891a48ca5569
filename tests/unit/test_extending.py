"""The code in docs/extending.md, run as it is written."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedllm.model.initial import initial_arrays
from strategies.registry import RECIPES
from tests.fake_federation import LAYOUT, InProcessGrid, QuadraticSite
from tests.unit.test_loop import params, run, sites

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture
def half_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    module = types.ModuleType("half_step_of_the_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, str(PAGE), "exec"), vars(module))
    yield "half-step"
    del RECIPES["half-step"]


def test_the_strategy_of_the_page_runs_and_does_what_it_says(half_step: str, tmp_path: Path) -> None:
    handlers = sites()
    folder = run(tmp_path, InProcessGrid(handlers), num_rounds=1, **{"strategy.name": half_step})
    members = [site for site in handlers.values() if isinstance(site, QuadraticSite)]
    for name, start in initial_arrays(LAYOUT, 42).items():
        mean = np.mean([site.optimum[name] for site in members], axis=0)
        np.testing.assert_allclose(params(folder)[name], start + 0.5 * 0.5 * (mean - start), rtol=1e-4, atol=1e-5)
