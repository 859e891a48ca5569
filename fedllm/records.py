"""Our messages as Flower's records and back: the only file that knows Flower's wire types.

One Flower message holds a config record ``fedllm`` with our message as JSON text, the transport's scalars beside it under
``transport.``, and at most one array: the packed payload as uint8 under its own ``stype``, because Flower's cost is per
array (448 arrays take 44 s a round where one takes 11 s, flwr 1.41) and because a bf16 tensor would not survive its NumPy
conversion.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedllm.errors import TransportError, explain
from fedllm.messages import AnyMessage, Message, parse_message
from fedllm.wire.transport import Envelope

RECORD = "fedllm"
BLOB = "payload"
STYPE = "fedllm.payload"
_PREFIX = "transport."


def to_records(message: Message, envelope: Envelope | None = None) -> RecordDict:
    """Pack one message, and what the transport adds to it."""
    fields = {f"{_PREFIX}{name}": value for name, value in envelope.fields.items()} if envelope else {}
    records = RecordDict({RECORD: ConfigRecord({"message": message.model_dump_json(), **fields})})
    if envelope and envelope.blob is not None:
        array = Array(dtype="uint8", shape=(len(envelope.blob),), stype=STYPE, data=bytes(envelope.blob))
        records[BLOB] = ArrayRecord({BLOB: array})
    return records


def from_records(records: RecordDict, where: str) -> tuple[AnyMessage, Envelope]:
    """Unpack what :func:`to_records` packed.

    Raises:
        TransportError: The records are not a message of ours.
    """
    config = records.config_records.get(RECORD)
    text = config.get("message") if config is not None else None
    if config is None or not isinstance(text, str):
        raise TransportError(explain("a Flower message holds no fedllm record", found=sorted(records), where=where))
    fields = {
        key.removeprefix(_PREFIX): value
        for key, value in config.items()
        if key.startswith(_PREFIX) and isinstance(value, str | int | float | bool)
    }
    return parse_message(text, where), Envelope(fields, _blob(records, where))


def _blob(records: RecordDict, where: str) -> bytes | None:
    arrays = records.array_records.get(BLOB)
    if arrays is None:
        return None
    array = arrays.get(BLOB)
    if array is None or array.stype != STYPE or array.dtype != "uint8":
        raise TransportError(explain("a Flower message's payload is not ours", expected=STYPE, where=where))
    return array.data
