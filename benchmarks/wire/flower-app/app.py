"""Send arrays to every client, get them back, average them: nothing but Flower's transport, as quick as it goes.

The round loop asks for replies twenty times a second; the stock one does so every three seconds.
"""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

server = ServerApp()
client = ClientApp()

POLL_S = 0.05


@client.train()
def answer(message: Message, _: Context) -> Message:
    """Send back what came; the arrays are unpacked and packed again as after training."""
    arrays = message.content["arrays"].to_numpy_ndarrays()
    return Message(
        RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"weight": 1})}), reply_to=message
    )


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Time rounds and write them to a file."""
    config = context.run_config
    while len(nodes := list(grid.get_node_ids())) < int(config["clients"]):
        time.sleep(POLL_S)
    arrays = drawn(int(config["arrays"]), int(config["megabytes"]))
    seconds = [timed_round(grid, nodes, arrays) for _ in range(int(config["rounds"]))]
    Path(str(config["output"])).write_text(json.dumps(seconds))


def drawn(num_arrays: int, megabytes: int) -> list[np.ndarray]:
    """Return so many arrays that make so many megabytes together; none is a single small one."""
    length = megabytes * 1_000_000 // 4 // num_arrays if num_arrays else 1
    return [np.random.default_rng(index).standard_normal(length, np.float32) for index in range(max(1, num_arrays))]


def timed_round(grid: Grid, nodes: list[int], arrays: list[np.ndarray]) -> float:
    """Run one round; return the seconds from the first message to the mean."""
    started = time.monotonic()
    record = ArrayRecord({str(index): Array(values) for index, values in enumerate(arrays)})
    content = {"arrays": record, "config": ConfigRecord({})}
    pending = set(grid.push_messages([Message(RecordDict(dict(content)), node, "train") for node in nodes]))
    sums = [np.zeros_like(values, np.float64) for values in arrays]
    while pending:
        for reply in grid.pull_messages(list(pending)):
            pending.discard(reply.metadata.reply_to_message_id)
            for total, values in zip(sums, reply.content["arrays"].to_numpy_ndarrays(), strict=True):
                total += values
        time.sleep(POLL_S)
    for total in sums:
        total /= len(nodes)
    return time.monotonic() - started
