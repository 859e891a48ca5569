"""Part b: the server's peak memory against the number of clients."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.wire.federation import federation

NUM_CLIENTS = (2, 8, 32)
NUM_PROCESSES = 2
PIPELINE = "nf4:64"


def measure(megabytes: int, repeats: int) -> dict[str, object]:  # noqa: ARG001  # a peak needs no median
    """Return peaks by number of clients, each from a fresh process, and their growth."""
    peaks = {str(clients): _fresh_peak(megabytes, clients) for clients in NUM_CLIENTS}
    growth = peaks[str(NUM_CLIENTS[-1])] - peaks[str(NUM_CLIENTS[0])]
    return {
        "server_peak_rss_bytes": peaks,
        "server_rss_growth_fraction_of_model": growth / (megabytes * 1_000_000),
    }


def _fresh_peak(megabytes: int, num_clients: int) -> int:
    command = [sys.executable, "-m", "benchmarks.wire.memory", str(megabytes), str(num_clients)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(json.loads(output.strip().splitlines()[-1]))


def peak_rss_bytes() -> int:
    """Return the most memory that this process had resident so far, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Run one round and print this process's peak."""
    megabytes, num_clients = int(sys.argv[1]), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        processes = min(NUM_PROCESSES, num_clients)
        with federation(Path(folder), megabytes, num_clients, processes, downlink=PIPELINE, uplink=PIPELINE) as ours:
            ours.round()
    print(peak_rss_bytes())


if __name__ == "__main__":
    main()
