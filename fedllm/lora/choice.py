"""What a site chose to train of a LoRA adapter, within the operator's bounds."""

from __future__ import annotations

import math

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, explain
from fedllm.messages import Introduction
from fedllm.model.spec import LoraSpec


def own_spec(adapter: LoraSpec, rank: int, alpha: float) -> LoraSpec:
    """Return what a site trains, by what it chose.

    Args:
        adapter: The federation's.
        rank: The site's choice, 0 for the federation's.
        alpha: The site's choice, 0 for the federation's.

    Raises:
        ConfigError: The choice is out of bounds.
    """
    rank, alpha = rank or adapter.rank, alpha or adapter.alpha
    if not adapter.min_rank and (rank, alpha) != (adapter.rank, adapter.alpha):
        expected, found = f"rank {adapter.rank}, alpha {adapter.alpha:g}", f"rank {rank}, alpha {alpha:g}"
        fix = "Take the run's at the site, or have the operator set adapter.min_rank."
        raise ConfigError(
            explain("the run leaves sites no choice of rank and alpha", expected=expected, found=found, fix=fix)
        )
    if not (adapter.min_rank or adapter.rank) <= rank <= adapter.rank:
        fix = "Choose another rank at the site, or have the operator change adapter.min_rank or adapter.rank."
        expected = f"{adapter.min_rank} to {adapter.rank}"
        raise ConfigError(explain("a site's LoRA rank is out of bounds", expected=expected, found=rank, fix=fix))
    return adapter.model_copy(update={"rank": rank, "alpha": alpha})


def pruned_spec(adapter: LoraSpec, rank: int, alpha: float, remaining: int) -> LoraSpec:
    """Return what a site trains that has given up components, at the scale that it chose.

    Args:
        adapter: The federation's.
        rank: The site's choice, 0 for the federation's.
        alpha: The site's choice, 0 for the federation's.
        remaining: Components that it still trains.

    Raises:
        ConfigError: They are more than it chose, or fewer than the operator allows.
    """
    own = own_spec(adapter, rank, alpha)
    fewest = adapter.min_rank or adapter.rank
    if not fewest <= remaining <= own.rank:
        raise ConfigError(
            explain("a site's remaining rank is out of bounds", expected=f"{fewest} to {own.rank}", found=remaining)
        )
    shrinkage = math.sqrt(remaining / own.rank) if adapter.rslora else remaining / own.rank
    return own.model_copy(update={"rank": remaining, "alpha": own.alpha * shrinkage})


def rank_without_tail(rank: int, share: float, fewest: int) -> int:
    """Return the components that are left of a site's if it gives up the last ones, HetLoRA's ``gamma r``.

    Args:
        rank: r, those that it trains.
        share: gamma, the share that is left, rounded down.
        fewest: What the operator allows, 0 where no component may be given up.
    """
    return min(rank, max(fewest or rank, math.floor(round(share * rank, 6))))  # 0.07 * 100 is a little more than 7


def rank_at(config: RunConfig, introduction: Introduction) -> int:
    """Return how many components a site trains of the run's adapter, 0 for all.

    Raises:
        ConfigError: What the site chose is out of the operator's bounds.
    """
    adapter = config.spec.adapter
    if not isinstance(adapter, LoraSpec):
        return 0
    rank = own_spec(adapter, introduction.rank, introduction.alpha).rank
    return rank if rank != adapter.rank else 0
