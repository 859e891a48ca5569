"""The update stream against Flower's own transport and against gRPC itself, its memory, and its manners on a bad line.

``python -m benchmarks.wire --json`` runs three parts (``--part a|b|c`` runs one), with real processes on loopback:

a. *Speed.* 200 MB of float32 to two clients and back. ``speedup_vs_flower_many_arrays`` and
   ``speedup_vs_flower_one_array``: a round of Flower's own transport (push of the messages to the last reply, and the
   mean) with 448 arrays and with one, over fetch + push + aggregate of the stream. Flower's round includes what its
   control plane takes whatever travels; ``flower_empty_round_s`` says how much, and the keys ending in
   ``_payload_only`` are the ratios after it is subtracted. ``fraction_of_raw_grpc``: seconds that a bare gRPC stream
   takes to move the same bytes down and up, over the stream's, which checks every byte and puts it on the disk.
   ``fraction_of_tuned_raw_grpc``: the same with our setting of the memory allocator at both ends of the bare stream.
b. *Memory.* Peak resident memory of a server that receives NF4 updates of a 200 MB model from 2, 8 and 32 clients:
   ``server_peak_rss_bytes``, and ``server_rss_growth_fraction_of_model``, the growth from the fewest to the most over
   the model's float32 bytes.
c. *A bad line.* 100 Mbit/s, 50 ms there and back, the connection reset in mid-push: ``resent_bytes_after_cut``, how many
   bytes more left the client than in an undisturbed push, and ``resent_chunks_after_cut``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from benchmarks.common import machine, show
from benchmarks.wire import cut, memory, speed

PARTS: dict[str, Callable[[int, int], dict[str, object]]] = {
    "a": speed.measure,
    "b": memory.measure,
    "c": cut.measure,
}


def main() -> None:
    """Run the parts and print what they measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--part", choices=sorted(PARTS), help="run one part only")
    parser.add_argument("--megabytes", type=int, default=200, help="float32 bytes of the model, in MB (parts a and b)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each kind; figures are medians")
    options = parser.parse_args()
    result: dict[str, object] = {"machine": machine(), "model_bytes": options.megabytes * 1_000_000}
    for name in options.part or PARTS:
        result |= PARTS[name](options.megabytes, options.repeats)
    show(result, as_json=options.json)


if __name__ == "__main__":
    main()
