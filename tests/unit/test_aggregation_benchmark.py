"""What `benchmarks.aggregation` says of aggregators, on a small model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.aggregation import kernel
from benchmarks.aggregation.__main__ import growth_of
from benchmarks.aggregation.adapter import MODULES, drawn, layout_of, spool
from benchmarks.aggregation.one import measure, write
from benchmarks.aggregation.rules import AT_ONCE, AVERAGES, PRODUCTS, SETTINGS, config_for
from fedllm.codecs.payload import open_payload
from strategies.compatibility import check_compatibility
from strategies.registry import RECIPES

SMALL = {"num_blocks": 1, "num_sites": 5, "rank": 4, "shrink": 64}


def test_the_adapter_is_that_of_a_7b_model() -> None:
    layout = layout_of(32, 16)
    assert len(layout.tensors) == 32 * 7 * 2
    assert layout.num_parameters == 39_976_960, "LoRA of rank 16 on all linear layers of Llama-7B"


def test_every_strategy_that_averages_in_its_own_way_is_measured_and_may_run() -> None:
    own_ways = {"fedavg", "ffa-lora", "zero-padding", "hetlora"}
    own_ways |= {"fedex", "fedsvd", "flexlora", "flora", "florist", "lora-fair"}
    assert own_ways == {*AVERAGES, *PRODUCTS}
    assert own_ways <= set(RECIPES)
    for name in SETTINGS:
        check_compatibility(config_for(name, 16, 32))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_aggregator_moves_the_state_and_says_what_it_took(name: str, tmp_path: Path) -> None:
    row = measure(name, folder=tmp_path, **SMALL)  # type: ignore[arg-type]
    assert row["blocks"] == 1
    assert 0 < row["seconds"] < 60  # type: ignore[operator]
    assert 0 < row["cpu_seconds"] < 60  # type: ignore[operator]
    assert 0 < row["rss_before_bytes"] <= row["peak_rss_bytes"]  # type: ignore[operator]
    assert row["needs_all_updates_at_once"] == (name in AT_ONCE)
    assert ("relative_error" in row) == (name in PRODUCTS)
    assert not list(tmp_path.glob("**/*.spooled")), "updates are deleted once they are folded"


def test_updates_are_written_once_and_differ_from_site_to_site(tmp_path: Path) -> None:
    layout = layout_of(1, 4, shrink=64)
    paths = spool(tmp_path, layout, 3, "fp32")
    stamps = [path.stat().st_mtime_ns for path in paths]
    assert [path.stat().st_mtime_ns for path in spool(tmp_path, layout, 3, "fp32")] == stamps
    name = layout.names[0]
    values = []
    for number, path in enumerate(paths):
        with open_payload(path, layout=layout, base="benchmark", kind="update", round_=1) as payload:
            values.append(payload.read(name))
        np.testing.assert_array_equal(values[-1], drawn(layout, 1 + number, 1e-3)[name])
    assert np.abs(values[0] - values[1]).max() > 1e-4


def test_the_core_decomposition_gives_what_the_dense_one_gives() -> None:
    found = kernel.measure(side=192, num_sites=6, rank=4, repeats=1)
    assert found["core_svd_largest_value_error"] < 1e-12  # type: ignore[operator]
    assert found["core_svd_top_product_error"] < 1e-6  # type: ignore[operator]
    assert found["core_svd_shape"] == [192, 192, 24]
    assert found["core_svd_speedup_vs_dense"] > 0  # type: ignore[operator]


def test_growth_is_what_goes_beyond_the_state() -> None:
    rows: dict[int, dict[str, object]] = {
        2: {"peak_rss_bytes": 150, "rss_before_bytes": 100, "update_bytes": 40},
        32: {"peak_rss_bytes": 170, "rss_before_bytes": 110, "update_bytes": 40},
    }
    assert growth_of(rows) == {"beyond_state_bytes": {"2": 50, "32": 60}, "growth_fraction_of_update": 0.25}


def test_the_benchmark_prints_one_object(tmp_path: Path) -> None:
    options = ["--json", "--no-kernel", "--blocks=1", "--sites=3", "--rank=1", "--only=fedavg,zero-padding"]
    command = [sys.executable, "-m", "benchmarks.aggregation", *options, f"--folder={tmp_path}"]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert set(result) == {"machine", "settings", "aggregators", "growth"}
    assert result["settings"] == {"blocks": 1, "part_blocks": 2, "sites": 3, "rank": 1, "uplink": "default"}
    assert set(result["aggregators"]) == {"fedavg", "zero-padding"}
    assert set(result["growth"]["fedavg"]["beyond_state_bytes"]) == {"2", "3"}
    assert len(MODULES) == 7
    assert not list(tmp_path.iterdir()), "nothing stays behind"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks can be set back on Linux only")
@pytest.mark.parametrize("name", AVERAGES)
def test_memory_of_a_rule_that_reads_updates_once_does_not_grow_with_the_sites(name: str, tmp_path: Path) -> None:
    peaks = {}
    for num_sites in (2, 24):
        write(name, 1, num_sites, 32, tmp_path)
        command = [sys.executable, "-m", "benchmarks.aggregation.one", name, "1", str(num_sites), "32", str(tmp_path)]
        row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert not row["needs_all_updates_at_once"]
        peaks[num_sites] = row["peak_rss_bytes"] - row["rss_before_bytes"]
    assert peaks[24] - peaks[2] < 0.5 * row["update_bytes"], "22 further updates take less than half of one"
