"""Error feedback: what a codec dropped from one update is added to the next.

``m = C(g + beta e)``, ``e <- g + beta e - m`` with g the update, e the residual, C encode-then-decode (Seide et al.,
Interspeech 2014; Karimireddy et al., ICML 2019, arXiv 1901.09847; beta < 1 as in SparseLoCo, arXiv 2508.15706). Needed by
every biased codec (``topk``, ``sign``, ``q2``, deterministic rounding); useless for one-shot clients.

These are pure functions; the residual belongs to the site, which keeps it in its state directory::

    feedback = ErrorFeedback(beta=1.0, max_age=10)
    carried = feedback.carried(residual, age_rounds)
    compensated = feedback.compensate(update, carried)
    info = encode_payload(sink, compensated, ..., is_difference=True, want_decoded=True)
    residual = feedback.residual(compensated, info.decoded)

With a server learning rate of 1 that is never annealed, strong sparsification with error feedback can diverge: watch
:func:`relative_norm`, which should settle (near 1/p rounds' worth of updates for a share p) and not grow.

With ``segment`` the residual rightly collects the parts that wait for their turn. With ``mask`` it also collects what the
mask will not pick for a long time: bound its age.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedllm.codecs.stage import Values
from fedllm.errors import ConfigError, explain
from fedllm.update import Arrays


@dataclass(frozen=True)
class ErrorFeedback:
    """The rule by which residuals are carried.

    Attributes:
        beta: Share of the residual that is carried on, in (0, 1].
        max_age: Rounds after which a residual is dropped, because the global state has moved on; 0 for never.

    Raises:
        ConfigError: A setting is outside its range.
    """

    beta: float = 1.0
    max_age: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.beta <= 1 or self.max_age < 0:
            expected = "0 < beta <= 1 and max_age >= 0"
            raise ConfigError(explain("error feedback is misconfigured", expected=expected, found=self))

    def carried(self, residual: Mapping[str, Values] | None, age: int) -> Mapping[str, Values] | None:
        """Return the residual if it is still to be used ``age`` rounds after it was made, else None."""
        return None if self.max_age and age > self.max_age else residual

    def compensate(self, update: Mapping[str, Values], residual: Mapping[str, Values] | None) -> Arrays:
        """Return new arrays ``g + beta e``; the update alone where there is no residual."""
        if residual is None:
            return {name: values.copy() for name, values in update.items()}
        beta = np.float32(self.beta)
        return {name: np.asarray(values + beta * residual[name]) for name, values in update.items()}

    def residual(self, compensated: Mapping[str, Values], decoded: Mapping[str, Values]) -> Arrays:
        """Return the new residual: what was meant minus what the receiver decodes."""
        return {name: np.asarray(values - decoded[name]) for name, values in compensated.items()}


def norm(arrays: Mapping[str, Values]) -> float:
    """Return the Euclidean norm over all tensors, summed in float64."""
    return math.sqrt(sum(float(np.square(values, dtype=np.float64).sum()) for values in arrays.values()))


def relative_norm(residual: Mapping[str, Values], update: Mapping[str, Values]) -> float:
    """Return the residual's norm over the update's, infinite for a residual beside an update of zeros."""
    found, scale = norm(residual), norm(update)
    return found / scale if scale else (math.inf if found else 0.0)
