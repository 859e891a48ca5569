"""What a strategy may change about a site's local steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import nn


class StepControl(Protocol):
    """Changes the gradients of one round's steps, in place."""

    def begin(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the trained parameters by tensor name; they hold the values that the round starts from."""

    def pull(self) -> None:
        """Add to the gradients of a step, before they are clipped."""

    def correct(self, rate: float) -> None:
        """Add to the gradients of a step, after they are clipped.

        Args:
            rate: The step's learning rate.
        """
