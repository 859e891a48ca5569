"""Death and silence in the middle of a round's transfers, with real processes: nothing is lost and nothing counts twice.

A relay between sites and the update server makes pushes slow enough to hit. Undisturbed and disturbed runs must end with
the same adapter bits, which they would not if an update were folded twice, or not at all.
"""

from __future__ import annotations

import itertools
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fedllm.config import RunConfig
from fedllm.data.partition import partition
from fedllm.data.sources import load_examples
from tests.flower_deployment import deployment
from tests.flower_process import Flower, flower, wait_while_running
from tests.free_ports import free_port
from tests.tiny_model import make_tiny_model
from tests.wire_tools import ChaosProxy

NUM_SITES = 2
RANK = 256
"""Large for the tiny model, so that an update has megabytes and folding it takes a while."""

OUTAGE_S = 30


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    folder = tmp_path_factory.mktemp("federation")
    make_tiny_model(folder / "model")
    (folder / "data.jsonl").write_text("\n".join(rows()))
    with flower(folder, FEDLLM_CACHE=str(folder / "cache")) as started:
        yield started


def rows() -> Iterator[str]:
    for topic, index in itertools.product(("colours", "numbers", "animals", "places"), range(16)):
        answer = f"{topic} number {index * 7 % 16}"
        messages = [{"role": "user", "content": f"say {topic} {index}"}, {"role": "assistant", "content": answer}]
        yield json.dumps({"messages": messages, "topic": topic})


def settings(folder: Path, name: str, **more: object) -> dict[str, object]:
    return {
        "name": name,
        "num_rounds": 2,
        "model.source": f"path:{folder / 'model'}",
        "adapter.target_modules": "all-linear",
        "adapter.rank": RANK,
        "data.source": f"file:{folder / 'data.jsonl'}",
        "data.max_length": 96,
        "train.local_steps": 1,
        "train.batch_size": 2,
        "train.num_threads": 1,
        "evaluation.every": 2,
        "evaluation.local_only": False,
        "evaluation.prompt": "",
        "transport.uplink": "delta|fp32",
        **more,
    }


@pytest.fixture(scope="module")
def undisturbed(home: Flower) -> bytes:
    return adapter(home, "undisturbed", home.run(settings(home.folder, "undisturbed"), NUM_SITES))


def adapter(home: Flower, name: str, output: str) -> bytes:
    path = home.folder / "runs" / name / "adapter" / "adapter_model.safetensors"
    assert path.is_file(), output
    return path.read_bytes()


class Relayed:
    """Settings and relay of a run whose sites reach the update server through a slow line only."""

    def __init__(self, bytes_per_s: float) -> None:
        port = free_port()
        self.proxy = ChaosProxy(port, bytes_per_s=bytes_per_s)
        self.settings = {"transport.ports": str(port), "transport.advertise": f"127.0.0.1:{self.proxy.port}"}

    def __enter__(self) -> Relayed:
        return self

    def __exit__(self, *_: object) -> None:
        self.proxy.__exit__()

    def has_sent(self, num_bytes: int) -> Callable[[], bool]:
        return lambda: self.proxy.up.num_bytes > num_bytes


def rounds(home: Flower, name: str) -> list[dict[str, object]]:
    return [event for event in home.events(name) if event["event"] == "round"]


def site_files(folder: Path) -> list[Path]:
    """Write what makes deployed sites of the simulated ones: their names, and their parts of the text."""
    lines = list(rows())
    examples = load_examples(f"file:{folder / 'data.jsonl'}", "auto", folder, deduplicate=True)
    parts = partition(examples, RunConfig().simulation, NUM_SITES, RunConfig().seed)
    paths = [folder / f"site-{index}.toml" for index in range(NUM_SITES)]
    for path, part in zip(paths, parts, strict=True):
        path.with_suffix(".jsonl").write_text("\n".join(lines[index] for index in part))
        path.write_text(
            f'[site]\nname = "{path.stem}"\n[data]\nsource = "file:{path.stem}.jsonl"\n'
            f'[paths]\nstate_dir = "state-{path.stem}"\ncache_dir = "cache"\n[transport]\ninsecure = true\n'
        )
    (folder / "deployed").mkdir()
    return paths


def run_config(config: dict[str, object]) -> str:
    return " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())


def test_a_client_killed_in_mid_push_hands_in_the_same_update_again(home: Flower, undisturbed: bytes) -> None:
    nodes = [f'site-config="{path}"' for path in site_files(home.folder)]
    with (
        Relayed(bytes_per_s=1e6) as line,
        deployment(home.folder / "deployed", nodes, is_warm=True, FEDLLM_HOME=str(home.folder)) as federation,
    ):
        config = settings(home.folder, "client-killed", **line.settings, **{"transport.insecure": True})
        process = federation.start(home.app, run_config(config))
        parts = home.folder / "runs" / "client-killed" / "spool" / "incoming"
        wait_while_running(process, lambda: any(parts.glob("1@site-0@*")))
        victims = federation.client_apps(0)
        assert victims, "the site's process pushes"
        for victim in victims:
            victim.send_signal(signal.SIGKILL)
        line.proxy.up.bytes_per_s = None
        output = process.communicate(timeout=480)[0]
    assert adapter(home, "client-killed", output) == undisturbed
    first = rounds(home, "client-killed")[0]
    assert first["participants"] == [f"site-{index}" for index in range(NUM_SITES)], first["rejected"]
    assert "asking site-0 again" in output


def test_a_server_killed_in_mid_fold_resumes_to_the_same_bits(home: Flower, undisturbed: bytes) -> None:
    process = home.start_until(settings(home.folder, "server-killed"), NUM_SITES, lambda: rounds(home, "server-killed"))
    family = home.server_family()
    received = home.folder / "runs" / "server-killed" / "spool" / "received" / "2"
    wait_while_running(process, lambda: number_of(received) == NUM_SITES, poll_s=0.0005)
    wait_while_running(
        process, lambda: number_of(received) < NUM_SITES, poll_s=0.0
    )  # the first update is folded and gone
    home.kill_server(family)
    process.kill()
    process.communicate()
    assert [event["round"] for event in rounds(home, "server-killed")] == [1], "round 2 was under way"
    output = home.run({**settings(home.folder, ""), "resume": "server-killed"}, NUM_SITES)
    assert adapter(home, "server-killed", output) == undisturbed
    assert [event["round"] for event in rounds(home, "server-killed")] == [1, 2]


def number_of(folder: Path) -> int:
    with suppress(OSError):
        return len(list(folder.iterdir()))
    return 0


def test_a_network_that_is_gone_for_half_a_minute_costs_time_only(home: Flower, undisturbed: bytes) -> None:
    with Relayed(bytes_per_s=1e6) as line:
        process = home.start_until(settings(home.folder, "cut", **line.settings), NUM_SITES, line.has_sent(700_000))
        line.proxy.go_down()
        time.sleep(OUTAGE_S)
        line.proxy.up.bytes_per_s = None
        line.proxy.come_up()
        output = process.communicate(timeout=480)[0]
    assert adapter(home, "cut", output) == undisturbed
    first, _ = rounds(home, "cut")
    assert first["rejected"] == [], first
    assert first["attempt"] == 1, "the round was not repeated"
    assert float(first["phases"]["train"]) > OUTAGE_S  # type: ignore[index]
