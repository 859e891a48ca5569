"""Which tensors of an update are worth sending, where a site sends a share of them.

After Che et al., "Federated Learning of Large Language Models with Parameter-Efficient Prompt Tuning and Adaptive
Optimization" (FedPepTAO), EMNLP 2023, arXiv 2310.15080, which sends the layers of a prefix that matter most.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray


def most_changed(
    delta: Mapping[str, NDArray[np.float32]], received: Mapping[str, NDArray[np.float32]], count: int
) -> list[str]:
    """Return the names of the tensors that changed most for their size, ``|delta| / |received|``, in the given order.

    Args:
        delta: What a round changed.
        received: What it started from; a tensor of zeros that changed at all comes first.
        count: How many; of equal ones the earlier.
    """
    scores = {name: _ratio(value, received[name]) for name, value in delta.items()}
    best = set(sorted(scores, key=lambda name: -scores[name])[:count])
    return [name for name in delta if name in best]


def _ratio(change: NDArray[np.float32], start: NDArray[np.float32]) -> float:
    size, moved = float(np.linalg.norm(start.astype(np.float64))), float(np.linalg.norm(change.astype(np.float64)))
    return moved / size if size else np.inf if moved else 0.0
