"""FedRot's alignment: a site turns its factors towards the federation's before it hands them in.

Zhang, Kim, Cha, Vikalo, "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA", ICML 2026 (arXiv 2602.23638).

A product has many factors, ``B A = (B R)(R^T A)`` for every orthogonal R. Sites that learn the same product in different
factors have factors whose mean means nothing. The R that brings a factor nearest to the received one solves an orthogonal
Procrustes problem: with ``A A_received^T = U S V^T``, or ``B^T B_received = U S V^T``, it is ``U V^T``. The product stays
as it was, and the mean of the factors loses less.

The paper turns by a share `strength` only: the rotation next to ``(1 - strength) I + strength R``, for which R must be a
proper rotation (no reflection); a whole turn may be any orthogonal R. A and B are the reference in turn. The first round
has nothing to turn to, since B is zero.

Shape legend: O out, I in, R rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedllm.update import Arrays

Matrix = NDArray[np.float64]


def aligned(trained: Arrays, received: Arrays, strength: float, round_: int) -> Arrays:
    """Return an adapter with the same products whose factors are nearer to the received ones.

    Args:
        trained: A site's adapter; what is not a pair of LoRA factors stays as it is.
        received: The state that the round started from.
        strength: Share of the turn, in (0, 1].
        round_: The round; even ones have A for reference, odd ones B, the first none.
    """
    if round_ == 1:
        return trained
    turned: Arrays = {}
    for a_name in (name for name in trained if ".lora_A." in name):
        b_name = a_name.replace(".lora_A.", ".lora_B.")
        a, b = trained[a_name].astype(np.float64), trained[b_name].astype(np.float64)  # [R, I], [O, R]
        by_a = round_ % 2 == 0
        correlation = a @ received[a_name].T if by_a else b.T @ received[b_name]  # [R, R]
        turn = rotation(correlation, strength)
        turned |= {a_name: (turn.T @ a).astype(np.float32), b_name: (b @ turn).astype(np.float32)}
    return trained | turned


def rotation(correlation: NDArray[np.floating], strength: float) -> Matrix:
    """Return the orthogonal matrix [R, R] that makes the share `strength` of the best turn."""
    best = _nearest(correlation, proper=strength < 1)
    return best if strength == 1 else _nearest((1 - strength) * np.eye(len(best)) + strength * best, proper=True)


def _nearest(matrix: NDArray[np.floating], *, proper: bool) -> Matrix:
    """Return the orthogonal matrix next to a matrix; with `proper`, the rotation."""
    u, _, v = np.linalg.svd(matrix.astype(np.float64))
    if proper and np.linalg.det(u @ v) < 0:
        u[:, -1] = -u[:, -1]  # the least loss of correlation
    nearest: Matrix = u @ v
    return nearest
