"""Where a site works: from the data owner's file in deployment, from the partition in simulation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from client_app.workplace import open_workplace
from fedllm.config import read_run_config
from fedllm.errors import ConfigError
from fedllm.messages import Hello

HELLO = Hello(run="../../etc/run", run_folder="/somewhere/runs/x", config={})


def write_rows(path: Path, count: int, topics: int = 2) -> None:
    rows = [
        {"prompt": f"question {index}", "completion": "yes", "topic": f"t{index % topics}"} for index in range(count)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))


def test_a_deployed_site_works_with_its_owners_data_and_folders(tmp_path: Path) -> None:
    write_rows(tmp_path / "own.jsonl", 5)
    (tmp_path / "site.toml").write_text(
        '[site]\nname = "clinic"\n[data]\nsource = "file:own.jsonl"\n[paths]\nstate_dir = "state"\ncache_dir = "cache"\n'
    )
    workplace = open_workplace({"site-config": str(tmp_path / "site.toml")}, HELLO)
    config = read_run_config({"data.source": "file:/the/operators/choice.jsonl"})
    assert workplace.site == "clinic"
    assert len(workplace.examples(config)) == 5
    assert workplace.data_config(config).source == f"file:{tmp_path / 'own.jsonl'}"
    assert workplace.state_dir.parent == tmp_path / "state", "a run's name cannot lead out of the state directory"
    assert workplace.cache_dir == tmp_path / "cache"


def test_simulated_sites_share_the_data_and_overlap_nowhere(tmp_path: Path) -> None:
    write_rows(tmp_path / "all.jsonl", 40, topics=4)
    hello = Hello(run="r", run_folder=str(tmp_path / "runs" / "r"), config={})
    config = read_run_config({"data.source": "file:all.jsonl"})
    parts = []
    for index in range(4):
        workplace = open_workplace({"partition-id": index, "num-partitions": 4}, hello)
        assert workplace.site == f"site-{index}"
        assert workplace.state_dir == tmp_path / "runs" / "r" / "sites" / f"site-{index}"
        parts.append({example.key for example in workplace.examples(config)})
    assert sum(map(len, parts)) == len(set.union(*parts)) == 40


def test_a_node_without_site_or_partition_is_told_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"names no site.*--node-config"):
        open_workplace({}, HELLO)
