"""A correction of the averaged B that brings the product of averages closer to the average of products.

Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement", ICCV 2025, arXiv
2411.14961: keep the mean A, and move the mean B by the step that minimises the distance to the ideal update plus a
penalty on the step.

Where we differ: the paper descends on a cosine distance; with the squared Frobenius distance
`|T - s (B + D) A|^2 + ridge |D|^2` the minimum is a closed form, one solve of size R:
`D = s (T - s B A) A^T (s^2 A A^T + ridge I)^-1`.

Only error inside the row space of the mean A can be removed, so this is a mild correction and not exact aggregation.

Shape legend: O out, I in, R rank.
"""

from __future__ import annotations

import numpy as np

from strategies.lowrank.product import Matrix, Product, difference, product


def corrected_left(target: Product, b: Matrix, a: Matrix, scale: float, ridge: float) -> Matrix:
    """Return the corrected B.

    Args:
        target: The ideal product [O, I].
        b: Mean B [O, R].
        a: Mean A [R, I].
        scale: The adapter's scale s.
        ridge: Weight of the penalty, positive; a large one leaves B as it is.
    """
    missing = difference(target, product(b, a, scale))
    gram = scale**2 * a @ a.T + ridge * np.eye(len(a))  # [R, R]
    toward = scale * missing.left @ (missing.right @ a.T)  # [O, R]
    return b + np.asarray(np.linalg.solve(gram, toward.T), np.float64).T
