"""What the benchmarks share: how they print, and on what they ran."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable

from fedllm.provenance import versions


def machine() -> dict[str, object]:
    """Return what a figure depends on besides the code: processor, cores, releases."""
    return {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform(), "versions": versions()}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median duration of a piece of work over repeats."""
    durations = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def show(result: dict[str, object], *, as_json: bool) -> None:
    """Print a result: one JSON object, or a line per key."""
    if as_json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:32} {value}")
