"""Token sequences as training and evaluation see them: plain NumPy, no torch.

Shape legend: L tokens in a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sequence:
    """One training sequence, holding one example or several that do not see each other.

    Attributes:
        input_ids: int32 [L], token ids.
        target_mask: bool [L], True where a token is to be predicted (the assistant's tokens, or all of plain text). The
            first token of a segment is never a target.
        segment_ids: int32 [L], 1, 2, ... for the examples packed into the sequence. A token attends to earlier tokens of
            its own segment only, and positions restart at 0 in each.
    """

    input_ids: NDArray[np.int32]
    target_mask: NDArray[np.bool_]
    segment_ids: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Tokens that count in the loss."""
        return int(self.target_mask.sum())
