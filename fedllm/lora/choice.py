"""What a site chose to train of a LoRA adapter, within the operator's bounds."""

from __future__ import annotations

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
