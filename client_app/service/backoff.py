"""How long to wait before the next start.

Waits double up to a bound and are drawn from the operating system's generator: sites that lost the server at the same
moment must not come back at the same moment, so nothing here follows from a seed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

FIRST_S, LONGEST_S = 2.0, 300.0
REFUSED_S = 10.0
SETTLED_S = 60.0

_random = random.SystemRandom()


@dataclass
class Backoff:
    """Counts starts in vain.

    Attributes:
        failures: Starts in vain since the last one that held.
    """

    failures: int = 0

    def next_wait_s(self, *, life_s: float, lapses: bool) -> float:
        """Return the wait before the next start, in seconds.

        Args:
            life_s: How long the last start held.
            lapses: It failed because the server waits for an old connection to lapse, which a steady retry catches soonest.
        """
        if lapses:
            return REFUSED_S * _random.uniform(0.5, 1.0)
        self.failures = 0 if life_s > SETTLED_S else self.failures + 1
        bound = min(LONGEST_S, FIRST_S * 2.0 ** min(self.failures, 20))
        return bound * _random.uniform(0.5, 1.0)
