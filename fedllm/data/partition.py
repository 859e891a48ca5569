"""One data set as several sites, for simulation, by the partitioners of flwr-datasets.

=============  =========================================================================================================
``iid``        equal shares of a shuffled data set (``IidPartitioner``)
``quantity``   shares of sizes 1 : 2 : 3 : ... of a shuffled data set (``LinearPartitioner``)
``dirichlet``  each label's examples divided by a draw from Dirichlet(alpha) (``DirichletPartitioner``; Yurochkin et al.,
               "Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019, arXiv 1905.12022)
``natural``    disjoint groups of ids such as topics (``GroupedNaturalIdPartitioner`` over groups of our own)
=============  =========================================================================================================

``natural`` does not leave the grouping to flwr-datasets, which takes a number of ids per group in the order in which they
occur: 21 topics in groups of 2 are 10 or 11 sites where 8 were asked for, and sizes are left to chance. Here the largest
id goes to the site with the fewest examples so far, then the next. That gives exactly the number of sites, none empty,
no id at two sites, and sizes as even as whole ids allow. The seed has no part in it.
"""

from __future__ import annotations

import heapq
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fedllm.config import SimulationConfig
from fedllm.data.examples import Example
from fedllm.errors import DataError, explain
from fedllm.rng import derive, generator

_MIN_EXAMPLES = 2  # one to train on, one to hold out


def partition(examples: Sequence[Example], config: SimulationConfig, num_partitions: int, seed: int) -> list[list[int]]:
    """Divide examples among sites.

    Args:
        examples: The whole data set.
        config: How to divide; ``partition_by`` names an attribute.
        num_partitions: Number of sites, at least 1.
        seed: The run's seed.

    Returns:
        Positions of each site's examples, ascending; every position occurs once.

    Raises:
        DataError: There are too few examples or ids for the sites, or an example lacks the attribute.
    """
    if len(examples) < num_partitions * _MIN_EXAMPLES:
        expected = f"at least {_MIN_EXAMPLES} examples for each of {num_partitions} sites"
        raise _impossible(config, expected, f"{len(examples)} examples")
    columns, partitioner = _prepare(examples, config, num_partitions, seed)
    parts = _load(columns, partitioner, config, num_partitions)
    smallest = min(map(len, parts))
    if smallest < _MIN_EXAMPLES:
        raise _impossible(config, f"at least {_MIN_EXAMPLES} examples at each site", f"{smallest} at one")
    return parts


def _prepare(
    examples: Sequence[Example], config: SimulationConfig, num_partitions: int, seed: int
) -> tuple[dict[str, list[Any]], Any]:
    """Return the columns of the data set to divide, with each example's position, and the partitioner for it."""
    from flwr_datasets.partitioner import (
        DirichletPartitioner,
        GroupedNaturalIdPartitioner,
        IidPartitioner,
        LinearPartitioner,
    )

    shuffled = generator(seed, purpose="partition").permutation(len(examples)).tolist()
    positions = list(range(len(examples)))
    match config.partitioner:
        case "iid":
            return {"position": shuffled}, IidPartitioner(num_partitions)
        case "quantity":
            return {"position": shuffled}, LinearPartitioner(num_partitions)
        case "dirichlet":
            labels = _labels(examples, config.partition_by)
            by_label = DirichletPartitioner(
                num_partitions, "label", config.dirichlet_alpha, _MIN_EXAMPLES, shuffle=False, seed=derive(seed)
            )
            return {"position": positions, "label": labels}, by_label
        case "natural":
            groups = _groups(_labels(examples, config.partition_by), config, num_partitions)
            by_group = GroupedNaturalIdPartitioner("group", group_size=1, sort_unique_ids=True)
            return {"position": positions, "group": groups}, by_group


def _load(
    columns: dict[str, list[Any]], partitioner: Any, config: SimulationConfig, num_partitions: int
) -> list[list[int]]:
    from datasets import Dataset

    partitioner.dataset = Dataset.from_dict(columns)
    try:
        with warnings.catch_warnings():
            # DirichletPartitioner warns at each redraw of a partition that is too small; it raises after the tenth.
            warnings.filterwarnings("ignore", message="The specified min_partition_size", category=UserWarning)
            parts = [partitioner.load_partition(i)["position"] for i in range(num_partitions)]
    except ValueError as error:
        raise _impossible(config, f"data for {num_partitions} sites", str(error).split(". ")[0]) from error
    return [sorted(part) for part in parts]


def _labels(examples: Sequence[Example], column: str) -> list[str]:
    for example in examples:
        if column not in example.attributes:
            raise _unlabelled(example, column)
    return [example.attributes[column] for example in examples]


def _unlabelled(example: Example, column: str) -> DataError:
    found = f"attributes {', '.join(sorted(example.attributes)) or '(none)'}"
    fix = "Set simulation.partition_by to a column with short values that every row has."
    return DataError(
        explain(
            "an example cannot be assigned",
            expected=f"attribute {column!r}",
            found=found,
            where=example.origin,
            fix=fix,
        )
    )


def _groups(labels: list[str], config: SimulationConfig, num_partitions: int) -> list[int]:
    """Assign each label to a site, largest first to the site with the fewest examples; ties by name and by number."""
    sizes = Counter(labels)
    if len(sizes) < num_partitions:
        expected = f"at least {num_partitions} different values of {config.partition_by!r}"
        raise _impossible(config, expected, f"{len(sizes)}")
    load = [(0, site) for site in range(num_partitions)]
    site_of = {}
    for label in sorted(sizes, key=lambda each: (-sizes[each], each)):
        size, site = heapq.heappop(load)
        site_of[label] = site
        heapq.heappush(load, (size + sizes[label], site))
    return [site_of[label] for label in labels]


def _impossible(config: SimulationConfig, expected: str, found: str) -> DataError:
    fix = "Simulate fewer sites, give more data, or choose another simulation.partitioner."
    problem = f"partitioner {config.partitioner!r} cannot divide the data"
    return DataError(explain(problem, expected=expected, found=found, where="simulation", fix=fix))
