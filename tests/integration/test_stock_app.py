"""The app of docs/flower-apps.md, as it stands there, run by `flwr run` with a SuperLink and SuperNodes of its own."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.flower_deployment import deployment
from tests.flower_process import REPOSITORY

PAGE = REPOSITORY / "docs" / "flower-apps.md"
A, B = "layer.lora_A.weight", "layer.lora_B.weight"
PROJECT = """
[project]
name = "quickstart"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "somebody"

[tool.flwr.app.components]
serverapp = "quickstart.server_app:app"
clientapp = "quickstart.client_app:app"

[tool.flwr.app.config]
output = ""
"""
Matrix = NDArray[np.float64]


def write_app(folder: Path) -> Path:
    """Write the page's files into a folder, with what Flower needs beside them."""
    (folder / "quickstart").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "quickstart" / "__init__.py").touch()
    files = re.findall(r"`(quickstart/\w+\.py)`:\n\n```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert [name for name, _ in files] == ["quickstart/server_app.py", "quickstart/client_app.py"]
    for name, text in files:
        (folder / name).write_text(text)
    return folder


def rolora_by_hand(num_sites: int, num_rounds: int) -> dict[str, Matrix]:
    """Alternate least squares with gradient steps in float64: B at all sites, mean, A at all sites, mean."""
    draws = [np.random.default_rng(100 + site) for site in range(num_sites)]
    inputs = [draw.standard_normal((20 * (site + 1), 6)) for site, draw in enumerate(draws)]
    maps = [draw.standard_normal((6, 4)) for draw in draws]
    state = {A: np.random.default_rng(0).standard_normal((2, 6)), B: np.zeros((4, 2))}
    counts = np.array([len(rows) for rows in inputs])
    for round_ in range(num_rounds):
        moved, trained = (B, A)[round_ % 2], []
        for rows, target in zip(inputs, maps, strict=True):
            site = dict(state)
            for _ in range(10):
                slope = (site[B] @ site[A] - target.T) @ (rows.T @ rows) / len(rows)
                site[moved] = site[moved] - 0.05 * (slope @ site[A].T if moved == B else site[B].T @ slope)
            trained.append(site[moved])
        state[moved] = np.tensordot(counts / counts.sum(), np.stack(trained), 1)
    return state


def test_the_app_of_the_page_learns_what_rolora_learns_by_hand(tmp_path: Path) -> None:
    app, output = write_app(tmp_path / "app"), tmp_path / "result.npz"
    home = tmp_path / "home"
    home.mkdir()
    configs = [f"partition-id={site} num-partitions=2" for site in range(2)]
    with deployment(home, configs, PYTHONPATH=str(REPOSITORY)) as federation:
        printed = federation.start(app, f'output="{output}"').communicate(timeout=480)[0]
    assert output.exists(), printed
    assert "fedllm: rolora" in printed
    expected = rolora_by_hand(num_sites=2, num_rounds=2)
    with np.load(output) as found:
        assert set(found.files) == {A, B}
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)
