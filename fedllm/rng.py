"""Every random draw of a run, from one seed.

``derive(seed, round, node, purpose)`` names a draw instead of a position in a stream, so the order in which processes
run, die and resume cannot change what is drawn. Privacy noise and privacy-relevant sampling do not come from here: they
come from the operating system's generator.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, round_: int = 0, node: str = "", purpose: str = "") -> int:
    """Return the 64-bit seed of one named draw.

    Args:
        seed: The run's seed, any integer.
        round_: The federation's round, 0 before the first.
        node: The site's name, empty for the server.
        purpose: What the draw is for, for example ``"batches"``.
    """
    text = f"{seed}\x1f{round_}\x1f{node}\x1f{purpose}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def generator(seed: int, round_: int = 0, node: str = "", purpose: str = "") -> np.random.Generator:
    """Return a NumPy generator (Philox, the same stream on every platform) for one named draw."""
    return np.random.Generator(np.random.Philox(derive(seed, round_, node, purpose)))
