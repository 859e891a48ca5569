"""The server's part of SCAFFOLD: the common control variate c moves by the mean change of the sites' own.

``c <- c + |S|/N mean_S(c_k' - c_k)`` for the sites S of the round among N that have joined (Karimireddy et al., ICML 2020,
arXiv 1910.06378); the mean is weighted as that of the deltas, so that c is the gradient of the objective that the weights
define. c never passes through the server optimizer, which is about the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedllm.codecs.feedback import norm
from fedllm.update import Arrays, Contribution, Layout
from fedllm.work import is_control
from strategies.slots import (
    Aggregation,
    Aggregator,
    Measurements,
    OptimizerState,
    Origin,
    ServerOptimizer,
    UpdateSource,
)


@dataclass(frozen=True)
class ControlledMean:
    """Any aggregator, with the control variates' mean change scaled to all sites.

    Args:
        inner: What makes the mean.
    """

    inner: Aggregator

    def start(self, layout: Layout, origin: Origin) -> Aggregation:
        """Begin the aggregate of a round."""
        return _Controlled(self.inner.start(layout, origin), origin.num_sites)


class _Controlled:
    def __init__(self, inner: Aggregation, num_sites: int) -> None:
        self._inner, self._num_sites, self._num_folded = inner, num_sites, 0

    @property
    def reads_until_finish(self) -> bool:
        """As the inner one does."""
        return self._inner.reads_until_finish

    def fold(self, update: UpdateSource, contribution: Contribution) -> None:
        """Take an update in."""
        self._inner.fold(update, contribution)
        self._num_folded += 1

    def finish(self) -> tuple[Arrays, Measurements]:
        """Return the delta with the share of the sites in the control variates' part."""
        delta, measured = self._inner.finish()
        share = np.float32(self._num_folded / max(self._num_sites, self._num_folded))
        control = {name: value * share for name, value in delta.items() if is_control(name)}
        adapter = {name: value for name, value in delta.items() if not is_control(name)}
        return adapter | control, {**measured, "delta_norm": norm(adapter), "control_norm": norm(control)}


@dataclass(frozen=True)
class ControlApart:
    """Any server optimizer for the adapter; control variates take their whole step.

    Args:
        inner: What moves the adapter.
    """

    inner: ServerOptimizer

    def apply(self, state: OptimizerState, params: Arrays, delta: Arrays) -> tuple[Arrays, OptimizerState]:
        """Return the moved state and the next memory."""
        steps = {name: value for name, value in delta.items() if not is_control(name)}
        moved, following = self.inner.apply(state, params, steps)
        control = {name: params[name] + value for name, value in delta.items() if is_control(name)}
        return moved | control, following
