"""SCAFFOLD's control variates at a site.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020 (arXiv 1910.06378).

Site k keeps c_k, the server sends c beside the state. Every local step takes ``g - c_k + c`` for the gradient g, and the
round ends with the paper's option II, ``c_k' = c_k - c + (w_global - w_k) / (steps * rate)``; the difference ``c_k' - c_k``
goes into the update. Under SGD that is the mean of the gradients g of the round's steps, weighted by their rates; we
compute it as that mean, which stays on the scale of a gradient under any local optimizer.

c is the mean of the c_k that the server knows of, so a site keeps that very c_k: a round whose update the server did not
take leaves it as it was, and what a lossy codec drops of a change is part of the next one. A site that has lost c_k starts
over from zero.
"""

from __future__ import annotations

import numpy as np

from client_app.kept import Kept
from fedllm.update import Arrays
from fedllm.work import control_name, is_control


class Variates:
    """The control variates of one round at one site.

    Args:
        kept: Where c_k is kept.
        last_folded: The last round whose update the server took, 0 for none.
        received: The state, with c in it.
    """

    def __init__(self, kept: Kept, last_folded: int, received: Arrays) -> None:
        found = kept.at(last_folded)
        self.was_lost = found is None and last_folded > 0
        self._kept = kept
        self._own = found or kept.first()
        self._common = {name: value for name, value in received.items() if is_control(name)}

    def correction(self, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        """Return ``c - c_k`` of one of the adapter's tensors."""
        control = control_name(name)
        return np.asarray(self._common[control] - self._own[control])

    def change(self, gradients: Arrays) -> Arrays:
        """Return ``c_k' - c_k`` by the control variates' names.

        Args:
            gradients: The round's mean gradients by the adapter's tensors.
        """
        following = {control_name(name): value for name, value in gradients.items()}
        return {name: np.asarray(value - self._own[name]) for name, value in following.items()}

    def keep(self, round_: int, decoded: Arrays) -> None:
        """Keep c_k as the server will know it, from the change that it will decode."""
        self._kept.keep(round_, {name: np.asarray(value + decoded[name]) for name, value in self._own.items()})
