"""The federation's adapter and a site's own as one LoRA adapter that computes the same, at a fixed share.

``(1 - a) s B A + a s B' A' = [(1 - a) s B | a s B'] [A; A']``: an adapter of rank R + P and scale 1, which any program that
reads LoRA can use. What it cannot do is choose the share by the instance, as :mod:`fedllm.model.dual` does.

Shape legend: R rank of the federation's adapter, P rank of the site's.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedllm.model.spec import LoraSpec
from fedllm.update import Arrays, Layout

_OWN = {"lora_A": "personal_A", "lora_B": "personal_B"}


def mixed_as_one(adapter: LoraSpec, layout: Layout, arrays: Arrays, share: float) -> tuple[LoraSpec, Layout, Arrays]:
    """Return spec, layout and values of the one adapter.

    Args:
        adapter: What the run trains.
        layout: The tensors of both adapters.
        arrays: Their values.
        share: a, the share of the site's own adapter.
    """
    values: Arrays = {}
    specs = []
    for spec in layout.tensors:
        if spec.role not in _OWN:
            continue
        own = spec.name.replace(f".{spec.role}.", f".{_OWN[spec.role]}.")
        axis, weights = (0, (1.0, 1.0)) if spec.role == "lora_A" else (1, (1 - share, share))
        scale = 1.0 if spec.role == "lora_A" else adapter.scale
        parts = [
            np.float64(scale * weight) * arrays[name] for weight, name in zip(weights, (spec.name, own), strict=True)
        ]
        values[spec.name] = np.ascontiguousarray(np.concatenate(parts, axis=axis), np.float32)
        specs.append(replace(spec, shape=values[spec.name].shape))
    rank = adapter.rank + adapter.personal_rank
    plain = {"rank": rank, "alpha": float(rank), "rslora": False, "personal_rank": 0}
    return adapter.model_copy(update=plain), Layout(tuple(specs)), values
