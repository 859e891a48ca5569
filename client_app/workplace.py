"""Where a site works: its name, its folders, its hardware, its data.

In deployment the data owner's file decides (:mod:`client_app.site`), named by ``site-config`` in the SuperNode's node
config.
In simulation there is no such file: the run config names the data of all sites, and the partition is this site's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from client_app.site import SiteConfig, load_site_config
from fedllm.config import DataConfig, RunConfig, SimulationConfig
from fedllm.data.examples import Example
from fedllm.data.partition import partition
from fedllm.data.sources import load_examples
from fedllm.errors import ConfigError, explain
from fedllm.home import default_cache_dir
from fedllm.messages import Instruction

SITE_CONFIG_KEY = "site-config"


@dataclass(frozen=True)
class Workplace:
    """One site's name, folders and hardware.

    Attributes:
        site: The site's stable name.
        state_dir: What must survive between rounds, for this run only.
        cache_dir: Quantized bases.
        home: Where relative paths of sources start.
        device: Torch device or ``auto``.
        num_threads: CPU threads, 0 for the run config's choice.
        partition: This site's index and the number of sites in simulation, None in deployment.
        owner: The data owner's file in deployment.
    """

    site: str
    state_dir: Path
    cache_dir: Path
    home: Path
    device: str
    num_threads: int
    partition: tuple[int, int] | None
    owner: SiteConfig | None

    def examples(self, config: RunConfig) -> list[Example]:
        """Read the site's examples.

        Raises:
            DataError: They cannot be read, or there are fewer than sites.
        """
        data = self.data_config(config)
        if self.partition is None:
            return list(_load(data, self.home))
        index, num_partitions = self.partition
        return _partitions(data, self.home, config.simulation, num_partitions, config.seed)[index]

    def prompt_length(self, config: RunConfig) -> int:
        """Return how many virtual tokens of a soft prompt the site wants to use, 0 for all."""
        if self.owner:
            return self.owner.adapter.num_virtual_tokens
        return config.simulation.prompt_length_of(self.partition[0]) if self.partition else 0

    def own_adapter(self, config: RunConfig) -> tuple[int, float]:
        """Return the LoRA rank and alpha that the site trains with, 0 for the run's."""
        if self.owner:
            return self.owner.adapter.rank, self.owner.adapter.alpha
        if self.partition is None:
            return 0, 0.0
        return config.simulation.adapter_of(self.partition[0])

    def data_config(self, config: RunConfig) -> DataConfig:
        """Return the run's data section with what the data owner decides put in its place."""
        return self.owner.merged_data(config.data) if self.owner else config.data


def open_workplace(node_config: Mapping[str, object], instruction: Instruction) -> Workplace:
    """Find out where this site works.

    Args:
        node_config: Flower's node config.
        instruction: What is asked; its run folder is used in simulation only.

    Raises:
        ConfigError: The node config names neither a site file nor a partition, or the site file is wrong.
    """
    path = node_config.get(SITE_CONFIG_KEY)
    if isinstance(path, str):
        return _deployed(load_site_config(Path(path)), instruction.run)
    index, num_partitions = node_config.get("partition-id"), node_config.get("num-partitions")
    if not isinstance(index, int) or not isinstance(num_partitions, int):
        fix = f"Start the SuperNode with --node-config '{SITE_CONFIG_KEY}=\"/path/site.toml\"'."
        raise ConfigError(explain("the node config names no site", found=sorted(node_config), fix=fix))
    return _simulated(index, num_partitions, Path(instruction.run_folder))


def _deployed(owner: SiteConfig, run: str) -> Workplace:
    return Workplace(
        site=owner.site.name,
        state_dir=owner.paths.state_dir / _run_folder_name(run),
        cache_dir=owner.paths.cache_dir,
        home=owner.home,
        device=owner.hardware.device,
        num_threads=owner.hardware.num_threads,
        partition=None,
        owner=owner,
    )


def _simulated(index: int, num_partitions: int, run_folder: Path) -> Workplace:
    site = f"site-{index}"
    return Workplace(
        site=site,
        state_dir=run_folder / "sites" / site,
        cache_dir=default_cache_dir(),
        home=run_folder.parent.parent,
        device="auto",
        num_threads=0,
        partition=(index, num_partitions),
        owner=None,
    )


def _run_folder_name(run: str) -> str:
    """Return a safe folder name for a run's name, which comes from the server."""
    return hashlib.sha256(run.encode()).hexdigest()[:16]


def _load(data: DataConfig, home: Path) -> tuple[Example, ...]:
    return _load_cached(data.source, data.format, home, data.deduplicate)


@lru_cache(maxsize=2)
def _load_cached(source: str, format_: str, home: Path, deduplicate: bool) -> tuple[Example, ...]:
    return tuple(load_examples(source, format_, home, deduplicate=deduplicate))


@lru_cache(maxsize=2)
def _partitions(
    data: DataConfig, home: Path, simulation: SimulationConfig, num_partitions: int, seed: int
) -> list[list[Example]]:
    """Return all partitions, once per process: simulated sites share it."""
    examples = _load(data, home)
    indices = partition(examples, simulation, num_partitions, seed)
    return [[examples[index] for index in part] for part in indices]
