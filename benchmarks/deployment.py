"""What a deployed round costs beside its work, how long a run takes to begin, and how much memory its processes take.

``python -m benchmarks.deployment --json`` provisions a federation, starts SuperLink, SuperExec, gateway and three sites
from their kits (TLS, node authentication, a network namespace each where that is permitted), and submits two runs with
`flwr run`: rounds of a tiny model, which trains in no time, and a round of SmolLM2-135M-Instruct in NF4 from the cache.

Keys: ``round_overhead_s`` (median over rounds of a round's duration without the training at the site that answered last)
and ``round_overhead_parts_s``, medians of its parts in their order:

========== =========================================================================================================
server     select, broadcast and aggregate
wait       from the server's message until a SuperNode asks for it, which it does every three seconds
start      until the SuperNode has all of it and the site's ClientApp runs
open       until it trains: app, libraries, base, adapter, data, the global state
hand_in    from the last step until its reply leaves: encode, push
reply      until the server has taken it
========== =========================================================================================================

``time_to_first_step_s`` is the time from calling `flwr run` until the first site begins its first step with SmolLM2, the
evaluation of the base included (``first_evaluation_s`` says how much of it that is); ``peak_rss_bytes`` is the most that
any process of each kind held in either run (``warm`` keeps libraries loaded, and shares them with the ``clientapp`` that is
forked from it).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import psutil

from benchmarks.common import machine, show
from client_app.audit.log import AuditLog, read_lines
from fedllm.home import default_cache_dir
from tests.bases import SMOLLM
from tests.provisioned import Provisioned, provisioned
from tests.tiny_model import make_tiny_model

SITES = ("north", "east", "south")
LOOK_S = 0.2
QUIET = {
    "evaluation.every": 100,
    "evaluation.local_only": False,
    "evaluation.prompt": "",
    "rounds.min_sites": len(SITES),
    "train.local_steps": 1,
    "train.batch_size": 1,
}
_KINDS = {
    "flower-superlink": "superlink",
    "flower-supernode": "supernode",
    "flwr-serverapp": "serverapp",
    "nginx": "gateway",
    "warm.py": "warm",
    "flower-superexec": "superexec",
}
"""What a kind of process has in its command."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=6, help="rounds without work")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        show({**measure(Path(temporary), arguments.rounds), "machine": machine()}, as_json=arguments.json)


def measure(folder: Path, num_rounds: int) -> dict[str, object]:
    """Run a federation twice and return what it took."""
    make_tiny_model(folder / "tiny")
    with provisioned(folder, SITES, short_heartbeat=False) as federation, peaks() as memory:
        for site in SITES:
            _fill_in(federation, site)
            federation.start_site(site)
        _wait_for_sites(federation)
        idle = {"name": "idle", "model.source": f"path:{folder / 'tiny'}", "num_rounds": num_rounds, **QUIET}
        _run(federation, idle)
        began = time.time()
        _run(federation, {"name": "real", "model.source": SMOLLM, "num_rounds": 1, **QUIET})
        rounds = list(_rounds(federation, "idle"))
        [evaluation] = [one for one in federation.events("real") if one["event"] == "evaluation" and one["round"] == 0]
        return {
            "round_overhead_s": statistics.median(sum(one.values()) for one in rounds),
            "round_overhead_parts_s": {name: statistics.median(one[name] for one in rounds) for name in rounds[0]},
            "time_to_first_step_s": min(_first_steps(federation, "real")) - began,
            "first_evaluation_s": evaluation["seconds"],
            "peak_rss_bytes": dict(sorted(memory.items())),
            "num_sites": len(SITES),
        }


def _fill_in(federation: Provisioned, site: str) -> None:
    kit = federation.kit(site)
    text = re.sub(r"(?m)^source = .*$", 'source = "file:train.jsonl"', (kit / "site.toml").read_text())
    (kit / "site.toml").write_text(re.sub(r"(?m)^cache_dir = .*$", f'cache_dir = "{default_cache_dir()}"', text))
    rows = [{"prompt": f"Who is number {i}?", "completion": f"Number {i} of {site}."} for i in range(12)]
    (kit / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))


def _wait_for_sites(federation: Provisioned) -> None:
    """Wait until every site is connected and has its libraries loaded, as one that serves for days has."""
    end = time.monotonic() + 600
    while not all("libraries are loaded" in federation.service_log(site) for site in SITES):
        if time.monotonic() > end:
            raise RuntimeError("\n".join(federation.status(site).sentence() for site in SITES))
        time.sleep(LOOK_S)


def _run(federation: Provisioned, config: Mapping[str, object]) -> None:
    name = str(config["name"])
    federation.submit(name, config).wait(3000)
    events = federation.events(name)
    if not events or events[-1].get("status") != "finished":
        raise RuntimeError(f"the run did not finish:\n{federation.log(name)}")


def _rounds(federation: Provisioned, run: str) -> Iterator[dict[str, float]]:
    """Yield the parts of every round's overhead at the site that answered last."""
    found = {site: list(moments(federation.service_log(site))) for site in SITES}
    for number, event in enumerate(event for event in federation.events(run) if event["event"] == "round"):
        server = {name: seconds for name, seconds in event["phases"].items() if name != "train"}
        sent = event["time"] - event["seconds"] + server.get("select", 0.0) + server.get("broadcast", 0.0)
        last = max(SITES, key=lambda site: found[site][number]["replied"])
        phases, taken = event["sites"][last]["phases"], sent + event["phases"]["train"]
        yield {"server": sum(server.values()), **parts_of(found[last][number], phases, sent, taken)}


def parts_of(moment: Mapping[str, float], phases: Mapping[str, float], sent: float, taken: float) -> dict[str, float]:
    """Return what a site's round consists of beside its training.

    A ClientApp may start while the SuperNode still fetches the end of a message.

    Args:
        moment: When what happened, as :func:`moments` yields it.
        phases: What the site reported.
        sent: When the server sent its message.
        taken: When it had all replies.
    """
    after = phases["encode"] + phases["push"]
    return {
        "wait": moment["asked"] - sent,
        "start": moment["started"] - moment["asked"],
        "open": moment["replied"] - moment["started"] - phases["train"] - after,
        "hand_in": after,
        "reply": taken - moment["replied"],
    }


_STEPS = {"Receiving: ": "asked", "Start `flwr-clientapp`": "started", "Sending: ": "replied"}


def moments(log: str) -> Iterator[dict[str, float]]:
    """Yield when what happened to every train message, in seconds since 1970, by the log of a site's service."""
    found: dict[str, float] = {}
    is_train = False
    for line in log.splitlines():
        step = next((name for words, name in _STEPS.items() if words in line), None)
        if step == "asked":
            is_train, found = "train message" in line, {}
        if step is not None:
            found[step] = datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()
        if step == "replied" and is_train:
            yield found


def _first_steps(federation: Provisioned, run: str) -> Iterator[float]:
    """Yield when each site began its first step: by its audit log, from the moment its update left."""
    [event] = [event for event in federation.events(run) if event["event"] == "round"]
    for site in SITES:
        log = AuditLog(federation.kit(site) / "state" / "audit")
        records = [line.record for line in read_lines(log) if line.record is not None and line.record.get("run") == run]
        [left] = [str(record["time"]) for record in records if record["event"] == "sending"]
        phases = event["sites"][site]["phases"]
        yield datetime.fromisoformat(left).timestamp() - phases["encode"] - phases["train"]


@contextmanager
def peaks() -> Iterator[dict[str, int]]:
    """Watch all Flower processes below this one; fill in the most that any of a kind ever held, in bytes."""
    found: dict[str, int] = {}
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(found, done), daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def _watch(found: dict[str, int], done: threading.Event) -> None:
    while not done.wait(LOOK_S):
        for process in psutil.Process().children(recursive=True):
            try:
                kind, parent = _kind(process), process.parent()
                kind = "clientapp" if kind == "warm" and parent and _kind(parent) == "warm" else kind
                peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            except (psutil.Error, OSError):
                continue
            if kind and peak:
                found[kind] = max(found.get(kind, 0), 1024 * int(peak[1]))


def _kind(process: psutil.Process) -> str | None:
    command = " ".join(process.cmdline())
    return next((name for words, name in _KINDS.items() if words in command), None)


if __name__ == "__main__":
    main()
