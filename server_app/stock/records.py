"""A stock app's records as our arrays, and back.

Names are the app's: what a state dict of PEFT or torch calls its tensors. LoRA factors are known by ``.lora_A.`` and
``.lora_B.`` in a name, a soft prompt's tensors by our own names for them; all else is averaged as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from typing import TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedllm.errors import LayoutError, UpdateError, explain
from fedllm.messages import MAX_COUNT
from fedllm.model.prompts.tensors import role_of
from fedllm.update import Arrays, Layout, TensorSpec, check_array

RecordT = TypeVar("RecordT", ArrayRecord, MetricRecord)


def layout_of(record: ArrayRecord) -> Layout:
    """Describe the arrays of a record, in its order.

    Raises:
        LayoutError: There are none, or some are not float32.
    """
    if strange := [f"{name}: {array.dtype}" for name, array in record.items() if array.dtype != "float32"]:
        fix = "Hand over the trained tensors only, as float32."
        raise LayoutError(explain("arrays of another type", expected="float32", found=strange[:3], fix=fix))
    if not record:
        raise LayoutError(explain("no arrays to train", where="initial_arrays"))
    return Layout(tuple(TensorSpec(name, tuple(array.shape), role=_role(name)) for name, array in record.items()))


def to_arrays(record: ArrayRecord, layout: Layout, where: str) -> Arrays:
    """Read the arrays of a record that may hold some tensors of a layout.

    Raises:
        LayoutError: A name is unknown, or a shape or type differs.
        NonFiniteError: A value is NaN or infinite.
        UpdateError: Its bytes are no array.
    """
    layout.only(list(record))  # refuses unknown names
    return {name: _read(record[name], layout[name], where) for name in layout.names if name in record}


def to_record(arrays: Arrays, layout: Layout) -> ArrayRecord:
    """Write arrays in the layout's order."""
    return ArrayRecord({name: Array(np.ascontiguousarray(arrays[name])) for name in layout.names})


def only_arrays(content: RecordDict) -> ArrayRecord:
    """Return a reply's one record of arrays.

    Raises:
        UpdateError: There are none, or several.
    """
    return _only(list(content.array_records.values()), "arrays")


def only_metrics(content: RecordDict) -> MetricRecord:
    """Return a reply's one record of metrics.

    Raises:
        UpdateError: There are none, or several.
    """
    return _only(list(content.metric_records.values()), "metrics")


def weight_of(metrics: MetricRecord, key: str) -> float:
    """Return the weight that a reply states, 1 where none is asked for.

    Raises:
        UpdateError: It is missing, not a number, not positive, or too large to be one.
    """
    weight = metrics.get(key) if key else 1.0
    if not isinstance(weight, int | float) or not 0 < weight <= MAX_COUNT:  # neither NaN nor infinity
        fix = "Put the number of training examples into the reply's metrics."
        raise UpdateError(explain("a reply states no weight", expected=f"a positive {key!r}", found=weight, fix=fix))
    return float(weight)


def mean_metrics(rows: Sequence[tuple[float, MetricRecord]], leave_out: Iterable[str] = ()) -> MetricRecord:
    """Return the weighted means of the numbers that every row has.

    Args:
        rows: Weight and metrics of each reply; at least one.
        leave_out: Keys whose mean says nothing.
    """
    total = math.fsum(weight for weight, _ in rows)
    common = set.intersection(*(set(_numbers(metrics)) for _, metrics in rows)) - set(leave_out)
    return MetricRecord(
        {key: math.fsum(weight / total * _numbers(metrics)[key] for weight, metrics in rows) for key in sorted(common)}
    )


def _numbers(metrics: MetricRecord) -> Mapping[str, float]:
    return {key: float(value) for key, value in metrics.items() if isinstance(value, int | float)}


def _only(records: list[RecordT], what: str) -> RecordT:
    if len(records) != 1:
        raise UpdateError(explain(f"a reply holds not one record of {what}", expected=1, found=len(records)))
    return records[0]


def _read(array: Array, spec: TensorSpec, where: str) -> NDArray[np.float32]:
    try:
        shape = _shape_inside(array)
        values = array.numpy() if shape == spec.shape else None
    except (TypeError, ValueError, EOFError, OSError) as error:
        raise UpdateError(explain(f"tensor {spec.name!r} cannot be read", found=error, where=where)) from error
    if values is None:
        problem = f"tensor {spec.name!r} has another shape"
        raise LayoutError(explain(problem, expected=spec.shape, found=shape, where=where))
    check_array(values, spec, where)
    return values


def _shape_inside(array: Array) -> tuple[int, ...]:
    """Return the shape that an array's own bytes state, for which memory would be set aside."""
    stream = BytesIO(array.data)
    np.lib.format.read_magic(stream)
    return tuple(np.lib.format.read_array_header_1_0(stream)[0])


def _role(name: str) -> str:
    return "lora_A" if ".lora_A." in name else "lora_B" if ".lora_B." in name else role_of(name)
