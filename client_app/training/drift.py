"""What keeps local steps from drifting away from the federation: a pull towards the received state, control variates.

- **FedProx** (Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv 1812.06127): the objective
  is ``f(w) + mu/2 |w - w_received|^2``, so every gradient gains ``mu (w - w_received)``, before it is clipped. The
  reported loss is that of f alone.
- **SCAFFOLD** (Karimireddy et al., ICML 2020, arXiv 1910.06378): every gradient gains ``c - c_k``, after it is clipped, so
  that clipping does not bias what the variates estimate. Nothing else changes under SGD; under AdamW, which rescales what
  it is given, the correction is a heuristic.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedllm.update import Arrays


class DriftControl:
    """Changes the gradients of one round's steps.

    Args:
        proximal: FedProx's mu, 0 for none.
        correction: SCAFFOLD's ``c - c_k`` by tensor name, None for none.
    """

    def __init__(self, proximal: float = 0.0, correction: Mapping[str, NDArray[np.float32]] | None = None) -> None:
        self._proximal, self._given = proximal, correction or {}
        self._parameters: Mapping[str, nn.Parameter] = {}
        self._anchors: dict[str, torch.Tensor] = {}
        self._correction: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._rates = 0.0

    def begin(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the trained parameters by tensor name; they hold the received values."""
        self._parameters = parameters
        if self._proximal:
            self._anchors = {name: value.detach().clone() for name, value in parameters.items()}
        self._correction = {name: torch.from_numpy(value).to(parameters[name]) for name, value in self._given.items()}
        self._sums = {name: torch.zeros_like(value) for name, value in self._correction.items()}

    @torch.no_grad()
    def pull(self) -> None:
        """Add the proximal term's gradient; to be called before clipping."""
        for name, anchor in self._anchors.items():
            parameter = self._parameters[name]
            if parameter.grad is not None:
                parameter.grad.add_(parameter - anchor, alpha=self._proximal)

    @torch.no_grad()
    def correct(self, rate: float) -> None:
        """Note the gradients of a step and add the control variates' correction; to be called after clipping."""
        self._rates += rate
        for name, correction in self._correction.items():
            gradient = self._parameters[name].grad
            assert gradient is not None, "every trained tensor has a gradient"
            self._sums[name].add_(gradient, alpha=rate)
            gradient.add_(correction)

    def mean_gradients(self) -> Arrays:
        """Return the mean of the noted gradients, weighted by the steps' rates."""
        assert self._rates > 0, "a round has at least one step"
        return {name: (value / self._rates).float().cpu().numpy() for name, value in self._sums.items()}
