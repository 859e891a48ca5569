"""Part c: a slow line whose connection is reset in mid-push."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from fedllm.wire.digest import CHUNK_BYTES
from tests.wire_tools import ChaosProxy, Site, payload, serving

PAYLOAD_BYTES = 24 * CHUNK_BYTES
BYTES_PER_S = 100e6 / 8
ROUND_TRIP_S = 0.05


def measure(megabytes: int, repeats: int) -> dict[str, object]:  # noqa: ARG001  # the size is the line's, not the model's
    """Return what a cut costs in bytes and seconds."""
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as site:
        whole_bytes, whole_s = _push(site, "undisturbed", ())
        cut_bytes, cut_s = _push(site, "cut", (PAYLOAD_BYTES // 2,))
    resent = cut_bytes - whole_bytes
    return {
        "resent_bytes_after_cut": resent,
        "resent_chunks_after_cut": resent / CHUNK_BYTES,
        "push_s": whole_s,
        "push_s_with_cut": cut_s,
        "line_fraction_used": PAYLOAD_BYTES / BYTES_PER_S / whole_s,
    }


def _push(site: Site, name: str, cut_at: tuple[int, ...]) -> tuple[int, float]:
    """Push a file over the line; return the bytes that left the client and the seconds."""
    path = site.folder / f"{name}.payload"
    receipt = payload(path, PAYLOAD_BYTES)
    line = ChaosProxy(site.server.port, cut_at=cut_at, bytes_per_s=BYTES_PER_S, delay_s=ROUND_TRIP_S / 2)
    with line as proxy:
        started = time.monotonic()
        site.client(proxy.port).push(site.ticket(site=name), path, receipt)
        seconds = time.monotonic() - started
        assert site.delivered(name) == path.read_bytes(), "the server has what was sent"
        assert proxy.num_connections == 1 + len(cut_at), "the connection was cut as often as asked"
    return proxy.up.num_bytes, seconds
