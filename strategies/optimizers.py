"""Server optimizers: how the global adapter moves along the aggregated delta.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (arXiv 2003.00295). The pseudo-gradient is ``-delta``. SGD,
Adagrad and Adam are torch.optim's, bias correction included (the paper's Algorithm 2 has none; Flower's FedAdam corrects
with exponent ``round + 1``). Yogi has no twin in torch and follows the paper, with Adam's bias correction.

SGD's momentum is ``m <- b m + delta`` (Flower, torch), not ``b m + (1 - b) delta``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedllm.update import Arrays
from strategies.slots import OptimizerState

Tensor = NDArray[np.float64]


@dataclass(frozen=True)
class Sgd:
    """Plain, momentum or Nesterov SGD; rate 1 without momentum is FedAvg.

    Args:
        learning_rate: Step size, positive.
        momentum: In [0, 1).
        nesterov: Look ahead along the momentum (DiLoCo's outer optimizer).
    """

    learning_rate: float = 1.0
    momentum: float = 0.0
    nesterov: bool = False

    def apply(self, state: OptimizerState, params: Arrays, delta: Arrays) -> tuple[Arrays, OptimizerState]:
        """Return the moved adapter and the next state."""
        if self.momentum == 0.0:
            moved = _move(params, delta, lambda _, step: self.learning_rate * step)
            return moved, state.after(delta)
        momentum = _blend(state, "m", delta, lambda old, step: self.momentum * old + step)
        moved = _move(params, delta, lambda name, step: self.learning_rate * self._direction(momentum[name], step))
        return moved, state.after(delta, {"m": momentum})

    def _direction(self, momentum: NDArray[np.float32], delta: Tensor) -> Tensor:
        return delta + self.momentum * momentum if self.nesterov else momentum.astype(np.float64)


@dataclass(frozen=True)
class Adagrad:
    """Adagrad: `v += delta^2; params += lr * delta / (sqrt(v) + tau)`."""

    learning_rate: float
    tau: float = 1e-3

    def apply(self, state: OptimizerState, params: Arrays, delta: Arrays) -> tuple[Arrays, OptimizerState]:
        """Return the moved adapter and the next state."""
        second = _blend(state, "v", delta, lambda old, step: old + step**2)
        moved = _move(params, delta, lambda name, step: self.learning_rate * step / (_root(second[name]) + self.tau))
        return moved, state.after(delta, {"v": second})


@dataclass(frozen=True)
class Adam:
    """Adam, and Yogi when `yogi` is set (`v -= (1 - b2) delta^2 sign(v - delta^2)`)."""

    learning_rate: float
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3
    yogi: bool = False

    def apply(self, state: OptimizerState, params: Arrays, delta: Arrays) -> tuple[Arrays, OptimizerState]:
        """Return the moved adapter and the next state."""
        first = _blend(state, "m", delta, lambda old, step: self.beta_1 * old + (1 - self.beta_1) * step)
        second = _blend(state, "v", delta, self._second_moment)
        following = state.after(delta, {"m": first, "v": second})

        def step(name: str, _: Tensor) -> Tensor:
            scale_1, scale_2 = (1 - beta ** following.counts[name] for beta in (self.beta_1, self.beta_2))
            denominator: Tensor = _root(second[name]) / np.sqrt(scale_2) + self.tau
            moved: Tensor = self.learning_rate * (first[name] / scale_1) / denominator
            return moved

        return _move(params, delta, step), following

    def _second_moment(self, old: Tensor, delta: Tensor) -> Tensor:
        square = delta**2
        if self.yogi:
            away: Tensor = old - (1 - self.beta_2) * square * np.sign(old - square)
            return away
        return self.beta_2 * old + (1 - self.beta_2) * square


def _root(second: NDArray[np.float32]) -> Tensor:
    return np.sqrt(second.astype(np.float64))


def _blend(state: OptimizerState, moment: str, delta: Arrays, rule: Callable[[Tensor, Tensor], Tensor]) -> Arrays:
    old = state.moments.get(moment, {})
    return {
        name: rule(old.get(name, np.zeros_like(value)).astype(np.float64), value.astype(np.float64)).astype(np.float32)
        for name, value in delta.items()
    }


def _move(params: Arrays, delta: Arrays, step: Callable[[str, Tensor], Tensor]) -> Arrays:
    return params | {
        name: (params[name].astype(np.float64) + step(name, value.astype(np.float64))).astype(np.float32)
        for name, value in delta.items()
    }
