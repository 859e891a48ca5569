"""Which sites learn alike: groups found from the B factors of one round.

As in FedLEASE (Wang et al., "Adaptive LoRA Experts Allocation and Selection for Federated Fine-Tuning", NeurIPS 2025,
arXiv 2509.15087): the distance of two sites is the mean over layers of ``1 - cos(B_i, B_j)``, sites are joined from the
bottom up by average linkage, and the number of groups is the one with the highest mean silhouette (Rousseeuw,
"Silhouettes", J. Comput. Appl. Math. 20, 1987). A silhouette cannot judge a single group, so where the best one is no
more than :data:`NO_STRUCTURE` all sites stay together.

Shape legend: K sites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedllm.update import Layout
from strategies.slots import Measurements, UpdateSource

Distances = NDArray[np.float64]

NO_STRUCTURE = 0.25
"""Mean silhouette up to which Kaufman and Rousseeuw (1990) find no substantial structure."""


@dataclass(frozen=True)
class AlikeByB:
    """Groups of sites whose updates of one round change B alike.

    Args:
        round: The round. In the first one the change of B is B itself, as in the paper; in a later one it is what a site
            wants beyond what all have learned by then.
        max_groups: Most groups to make.
    """

    round: int
    max_groups: int

    def is_due(self, round_: int) -> bool:
        """Tell whether this is the round."""
        return round_ == self.round

    def groups(self, updates: Mapping[str, UpdateSource], layout: Layout) -> tuple[dict[str, int], Measurements]:
        """Return each site's group, the largest first, of equal ones the one with the first name; and the silhouette."""
        sites = sorted(updates)
        distances = distances_of([updates[site] for site in sites], layout)
        groups = best_partition(distances, self.max_groups)
        numbers = {index: number for number, group in enumerate(groups) for index in group}
        measured: dict[str, float] = {"num_groups": len(groups)}
        if len(groups) > 1:
            measured["silhouette"] = silhouette(distances, groups)
        return {site: numbers[index] for index, site in enumerate(sites)}, measured


def distances_of(updates: Sequence[UpdateSource], layout: Layout) -> Distances:
    """Return the distances [K, K] of updates, one tensor of all of them in memory at a time."""
    names = [spec.name for spec in layout.tensors if spec.role == "lora_B"]
    total = np.zeros((len(updates), len(updates)))
    for name in names:
        total += 1 - _cosines(np.stack([update.read(name).reshape(-1).astype(np.float64) for update in updates]))
    np.fill_diagonal(total, 0.0)
    return total / len(names)


def best_partition(distances: Distances, max_clusters: int) -> list[list[int]]:
    """Return the groups with the highest mean silhouette, ordered by size, one group where no structure is found."""
    everything = [list(range(len(distances)))]
    best, found = NO_STRUCTURE, everything
    for groups in _partitions(distances):
        if 1 < len(groups) <= max_clusters and len(groups) < len(distances):
            value = silhouette(distances, groups)
            if value > best:
                best, found = value, groups
    return sorted((sorted(group) for group in found), key=lambda group: (-len(group), group))


def silhouette(distances: Distances, groups: Sequence[Sequence[int]]) -> float:
    """Return the mean over sites of ``(b - a) / max(a, b)``; a site alone in its group counts zero.

    a is a site's mean distance to the others of its group, b to the nearest other group.
    """
    values = []
    for group in groups:
        others = [other for other in groups if other is not group]
        for index in group:
            if len(group) == 1:
                values.append(0.0)
                continue
            inside = distances[index, group].sum() / (len(group) - 1)
            outside = min(distances[index, list(other)].mean() for other in others)
            values.append((outside - inside) / max(inside, outside, np.finfo(float).tiny))
    return float(np.mean(values))


def _partitions(distances: Distances) -> list[list[list[int]]]:
    """Return the partitions of average linkage, from single sites to all in one; ties go to the first pair."""
    groups = [[index] for index in range(len(distances))]
    between = distances.copy()
    partitions = [[list(group) for group in groups]]
    while len(groups) > 1:
        rows, columns = np.triu_indices(len(groups), 1)
        nearest = int(np.argmin(between[rows, columns]))
        first, second = int(rows[nearest]), int(columns[nearest])
        between = _joined(between, first, second, len(groups[first]), len(groups[second]))
        groups[first] = groups[first] + groups.pop(second)
        partitions.append([list(group) for group in groups])
    return partitions


def _joined(between: Distances, first: int, second: int, num_first: int, num_second: int) -> Distances:
    """Return distances after two groups became one: the mean over their members (Lance and Williams)."""
    mean = (num_first * between[first] + num_second * between[second]) / (num_first + num_second)
    result = between.copy()
    result[first], result[:, first], result[first, first] = mean, mean, 0.0
    return np.delete(np.delete(result, second, axis=0), second, axis=1)


def _cosines(rows: NDArray[np.float64]) -> Distances:
    """Return the cosines [K, K] of vectors [K, n]; of a zero vector zero."""
    norms = np.linalg.norm(rows, axis=1)
    scaled = rows / np.where(norms > 0, norms, 1.0)[:, None]
    cosines: Distances = scaled @ scaled.T
    return cosines
