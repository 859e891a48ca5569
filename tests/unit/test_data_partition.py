"""Partitions: every example once, by the rule that was asked for, or a clear refusal."""

import subprocess
import sys
from collections import Counter

import pytest

from fedllm.config import SimulationConfig
from fedllm.data.examples import Example
from fedllm.data.partition import partition
from fedllm.errors import DataError

PARTITIONERS = ("iid", "dirichlet", "natural", "quantity")
SIZES = {"a": 50, "b": 30, "c": 20, "d": 10, "e": 7, "f": 3}


def examples_of(sizes):
    return [
        Example(text=f"{topic} {i}", attributes={"topic": topic}, origin=f"row {i}")
        for topic, size in sizes.items()
        for i in range(size)
    ]


def config_of(name, **values):
    return SimulationConfig(partitioner=name, **values)


def topics_of(examples, part):
    return Counter(examples[i].attributes["topic"] for i in part)


@pytest.mark.parametrize("name", PARTITIONERS)
@pytest.mark.parametrize("num_partitions", [1, 3, 6])
def test_every_example_is_at_exactly_one_site(name, num_partitions):
    examples = examples_of(SIZES)
    parts = partition(examples, config_of(name, dirichlet_alpha=2.0), num_partitions, 42)
    assert len(parts) == num_partitions
    assert sorted(i for part in parts for i in part) == list(range(len(examples)))
    assert all(part == sorted(part) and len(part) >= 2 for part in parts)


@pytest.mark.parametrize("name", PARTITIONERS)
def test_the_same_seed_gives_the_same_sites(name):
    examples = examples_of(SIZES)
    one, other = (partition(examples, config_of(name), 3, 7) for _ in range(2))
    assert one == other


@pytest.mark.parametrize("name", ["iid", "dirichlet", "quantity"])
def test_another_seed_gives_other_sites(name):
    examples = examples_of(SIZES)
    drawn = [partition(examples, config_of(name), 3, seed) for seed in range(4)]
    assert all(one != other for i, one in enumerate(drawn) for other in drawn[:i])


def test_iid_sites_are_equally_large_and_mixed():
    examples = examples_of({"a": 300, "b": 300})
    for part in partition(examples, config_of("iid"), 3, 42):
        assert len(part) == 200
        assert 60 < topics_of(examples, part)["a"] < 140  # 100 expected, standard deviation below 6


def test_quantity_sites_grow_in_equal_steps():
    parts = partition(examples_of({"a": 600}), config_of("quantity"), 3, 42)
    assert [len(part) for part in parts] == [100, 200, 300]
    assert parts[0] != list(range(100))


def test_a_small_dirichlet_concentration_separates_topics_and_a_large_one_mixes_them():
    examples = examples_of({"a": 300, "b": 300, "c": 300})

    def largest_share(alpha):
        parts = partition(examples, config_of("dirichlet", dirichlet_alpha=alpha), 3, 42)
        shares = [max(topics_of(examples, part).values()) / len(part) for part in parts]
        return sum(shares) / len(shares)

    assert largest_share(1000.0) < 0.4
    assert largest_share(0.1) > 0.7


def test_natural_sites_share_no_topic_and_are_balanced_by_size():
    examples = examples_of(SIZES)
    parts = partition(examples, config_of("natural"), 3, 42)
    assert [dict(topics_of(examples, part)) for part in parts] == [
        {"a": 50},
        {"b": 30, "e": 7},
        {"c": 20, "d": 10, "f": 3},
    ]


def test_natural_looks_at_the_column_that_is_named():
    examples = [Example(text=str(i), attributes={"ward": "xyz"[i % 3]}) for i in range(12)]
    parts = partition(examples, config_of("natural", partition_by="ward"), 3, 42)
    assert [{examples[i].attributes["ward"] for i in part} for part in parts] == [{"x"}, {"y"}, {"z"}]


def test_natural_does_not_depend_on_the_order_of_the_examples():
    examples = examples_of(SIZES)
    parts = partition(examples, config_of("natural"), 3, 42)
    turned = partition(examples[::-1], config_of("natural"), 3, 42)
    assert [topics_of(examples, part) for part in parts] == [topics_of(examples[::-1], part) for part in turned]


@pytest.mark.parametrize(
    ("config", "sizes", "num_partitions", "message"),
    [
        (config_of("iid"), {"a": 5}, 3, "at least 2 examples for each of 3 sites; found 5 examples"),
        (config_of("quantity"), {"a": 20}, 10, "'quantity' cannot divide"),
        (config_of("natural"), SIZES, 7, "at least 7 different values of 'topic'; found 6"),
        (config_of("natural"), {"a": 9, "b": 1}, 2, "at least 2 examples at each site; found 1"),
        (config_of("natural", partition_by="ward"), SIZES, 2, "attribute 'ward'; found attributes topic; in row 0"),
        (config_of("dirichlet", partition_by="ward"), SIZES, 2, "attribute 'ward'"),
        (config_of("dirichlet", dirichlet_alpha=1e-4), {"a": 40}, 5, "'dirichlet' cannot divide"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_numbers(config, sizes, num_partitions, message):
    with pytest.raises(DataError, match=message):
        partition(examples_of(sizes), config, num_partitions, 42)


def test_partitioning_loads_no_torch():
    code = """
import sys
from fedllm.config import SimulationConfig
from fedllm.data.examples import Example
from fedllm.data.partition import partition
assert "flwr_datasets" not in sys.modules, "imported before it is needed"
examples = [Example(text=str(i), attributes={"topic": str(i % 4)}) for i in range(40)]
for name in ("iid", "dirichlet", "natural", "quantity"):
    partition(examples, SimulationConfig(partitioner=name), 2, 0)
assert "flwr_datasets" in sys.modules and "torch" not in sys.modules
import fedllm.data.batches, fedllm.data.encode, fedllm.data.prepare, fedllm.data.sources, client_app.site
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
