"""What cannot be combined, said before anything is sent.

The matrix is :data:`REFUSALS`: for a choice (a strategy, an aggregator), the features it cannot go with and why. Features
are questions to the run config (:data:`FEATURES`). What is not in the matrix goes together. Bounds on numbers are in
:data:`BOUNDS`. To add a strategy, add a row; to add an axis, add a feature and fill in the rows that refuse it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from fedllm.codecs.pipeline import parse
from fedllm.codecs.stage import Kind
from fedllm.config import RunConfig, flatten
from fedllm.errors import ConfigError, explain
from strategies.robust.coordinates import num_trimmed
from strategies.weights import heeds_weights

Question = Callable[[RunConfig], bool]

FEATURES: dict[str, Question] = {
    "adapter.min_virtual_tokens": lambda config: config.adapter.min_virtual_tokens > 0,
    "adapter.kind = 'lora'": lambda config: config.adapter.kind == "lora",
    "an adapter.kind other than 'lora'": lambda config: config.adapter.kind != "lora",
    "an adapter.kind without layers": lambda config: config.adapter.kind in ("prompt", "ptuning"),
    "an adapter.kind other than 'prefix'": lambda config: config.adapter.kind != "prefix",
    "transport.uplink with segment": lambda config: _uplink_has(config, "segment"),
    "transport.uplink with topk": lambda config: _uplink_has(config, "topk"),
    "strategy.robust_on = 'products'": lambda config: config.strategy.robust_on == "products",
    "strategy.robust_on = 'products' but for krum": lambda config: (
        config.strategy.robust_on == "products"
        and (config.strategy.aggregator not in ("mean", "krum") or config.strategy.norm_bound != 0)
    ),
    "strategy.aggregator other than 'mean'": lambda config: config.strategy.aggregator != "mean",
    "strategy.norm_bound": lambda config: config.strategy.norm_bound != 0,
    "strategy.aggregator = 'median' or 'trimmed-mean'": lambda config: (
        config.strategy.aggregator in ("median", "trimmed-mean")
    ),
    "adapter.min_rank": lambda config: config.adapter.min_rank > 0,
    "a server optimizer": lambda config: (
        (config.strategy.server_optimizer, config.strategy.server_learning_rate, config.strategy.server_momentum)
        != ("sgd", 1.0, 0.0)
        or config.strategy.server_anneal != "constant"
    ),
    "rounds.buffer_size": lambda config: config.rounds.buffer_size > 0,
    "rounds.fraction or rounds.over_selection": lambda config: (
        config.rounds.fraction < 1 or config.rounds.over_selection > 1
    ),
    "rounds.sampler = 'poisson'": lambda config: config.rounds.sampler == "poisson" and config.rounds.fraction < 1,
}
"""Questions by what a message calls the feature."""

_SEGMENT = {
    "adapter.min_virtual_tokens": "sites with shorter prompts say nothing of the other tokens",
    "transport.uplink with segment": (
        "sites send different parts of their updates, which cannot be compared with each other"
    ),
}
_BY_COORDINATE = {
    **_SEGMENT,
    "transport.uplink with topk": "sites send different coordinates, and the middle of mostly zeros is zero",
    "strategy.robust_on = 'products'": (
        "the rule has no verdict on a whole update, and the median of products has no low rank"
    ),
}
_OWN_AGGREGATOR = {
    "strategy.aggregator other than 'mean'": "the strategy chooses its own aggregator",
    "strategy.norm_bound": "the strategy chooses its own aggregator",
}

_MEAN_OF_FACTORS = {
    "strategy.robust_on = 'products' but for krum": (
        "the strategy averages factors, and an update that changes no product by itself can ruin the mean of factors"
    ),
}

_TOGETHER = "rounds.buffer_size"
_IN_GROUPS = {
    _TOGETHER: "the groups are found from updates of one round, which all sites start together",
    "strategy.aggregator other than 'mean'": (
        "a robust rule needs more honest sites than lying ones in what it aggregates, and a group can be small"
    ),
    "transport.uplink with segment": "sites send different parts of B, which cannot be compared with each other",
    "rounds.fraction or rounds.over_selection": "all sites take part in the round that finds the groups",
    "rounds.sampler = 'poisson'": "all sites take part in the round that finds the groups",
}
_ONE_FACTOR = {
    "strategy.robust_on = 'products'": "an update holds one factor only, and the other one is not known to the server"
}
_ON_FACTORS = {"an adapter.kind other than 'lora'": "the strategy is about LoRA's two factors"}
_BY_LAYER = {"an adapter.kind without layers": "the strategy divides an adapter between layers"}
_ONE_PER_LAYER = {"an adapter.kind other than 'prefix'": "the strategy chooses among the layers of a prefix"}
_ON_SOFT_PROMPTS = {"adapter.kind = 'lora'": "the strategy is about soft prompts"}
_NO_PRODUCTS = {"strategy.robust_on = 'products'": "a soft prompt has no products"}

_MEAN_OF_PRODUCTS = {
    **_ON_FACTORS,
    "strategy.aggregator = 'median' or 'trimmed-mean'": "the middle of products has no low rank",
    "transport.uplink with segment": "sites send different parts of their factors, and a product needs both",
    "a server optimizer": (
        "the strategy replaces the factors, and part of the way between two pairs of factors lies the product of neither; "
        "leave strategy.server_* at their defaults"
    ),
}

_NEW_FACTORS = {
    **_MEAN_OF_PRODUCTS,
    "rounds.buffer_size": "a late update is of factors that the strategy has replaced since",
}

_ONE_SIZE = {"adapter.min_rank": "the matrix between the factors has one size at all sites"}
_ONE_RANK = {"adapter.min_rank": "turning factors mixes the components that a site trains with those that it does not"}
_ONE_SHAPE = {
    **_OWN_AGGREGATOR,
    "adapter.min_rank": "control variates have one shape and one scale at all sites",
}

REFUSALS: dict[str, Mapping[str, str]] = {
    "adapter.kind = 'lora'": {},
    "adapter.kind = 'prompt'": _NO_PRODUCTS,
    "adapter.kind = 'prefix'": _NO_PRODUCTS,
    "adapter.kind = 'ptuning'": _NO_PRODUCTS,
    "strategy.name = 'clustered'": {**_IN_GROUPS, **_MEAN_OF_FACTORS, **_ON_FACTORS},
    "strategy.name = 'fed-sb'": {**_MEAN_OF_PRODUCTS, **_ONE_FACTOR, **_ONE_SIZE},
    "strategy.name = 'fedavg'": _MEAN_OF_FACTORS,
    "strategy.name = 'feddpa'": {
        **_MEAN_OF_FACTORS,
        **_ON_FACTORS,
        "adapter.min_rank": "a site's own adapter has the federation's scale, which is then not the same at all sites",
    },
    "strategy.name = 'fedex'": {**_NEW_FACTORS, **_MEAN_OF_FACTORS},
    "strategy.name = 'fedper'": {**_MEAN_OF_FACTORS, **_BY_LAYER},
    "strategy.name = 'fedpeptao'": {**_ONE_PER_LAYER, **_OWN_AGGREGATOR},
    "strategy.name = 'fedprompt'": _ON_SOFT_PROMPTS,
    "strategy.name = 'fedprox'": _MEAN_OF_FACTORS,
    "strategy.name = 'fedrot'": {
        **_MEAN_OF_FACTORS,
        **_ON_FACTORS,
        **_ONE_RANK,
        _TOGETHER: "sites turn their factors towards the state that they received, which is not the same for all",
    },
    "strategy.name = 'fedsa-lora'": {**_ONE_FACTOR, **_ON_FACTORS},
    "strategy.name = 'fedsvd'": {**_NEW_FACTORS, **_ONE_FACTOR},
    "strategy.name = 'ffa-lora'": _ON_FACTORS,
    "strategy.name = 'flexlora'": _NEW_FACTORS,
    "strategy.name = 'flora'": _NEW_FACTORS,
    "strategy.name = 'florist'": _NEW_FACTORS,
    "strategy.name = 'hetlora'": {**_OWN_AGGREGATOR, **_ON_FACTORS},
    "strategy.name = 'lora-fair'": {**_NEW_FACTORS, **_MEAN_OF_FACTORS},
    "strategy.name = 'ravan'": {**_ONE_FACTOR, **_ON_FACTORS, **_ONE_SIZE},
    "strategy.name = 'rolora'": {
        **_MEAN_OF_FACTORS,
        **_ON_FACTORS,
        _TOGETHER: "a late update is of the factor whose turn it was, not of the one whose turn it is",
    },
    "strategy.name = 'scaffold'": {
        **_ONE_SHAPE,
        _TOGETHER: "control variates correct steps that all sites start together",
    },
    "strategy.name = 'zero-padding'": {**_OWN_AGGREGATOR, **_ON_FACTORS},
    "strategy.aggregator = 'mean'": {},
    "strategy.aggregator = 'median'": _BY_COORDINATE,
    "strategy.aggregator = 'trimmed-mean'": _BY_COORDINATE,
    "strategy.aggregator = 'krum'": _SEGMENT,
    "strategy.aggregator = 'multi-krum'": _SEGMENT,
    "strategy.aggregator = 'geometric-median'": _SEGMENT,
    "strategy.aggregator = 'fltrust'": {
        **_SEGMENT,
        "rounds.fraction or rounds.over_selection": "every round needs the trusted site's update",
    },
    "strategy.norm_bound": _SEGMENT,
    "simulation.ranks": {},
    "simulation.alphas": {},
    "adapter.personal_rank": {},
    "rounds.buffer_size": {
        "strategy.aggregator other than 'mean'": (
            "updates of several ages differ by nature, and a rule that compares them takes the late ones for lies"
        ),
        "rounds.fraction or rounds.over_selection": "every site that is free is kept at work",
        "rounds.sampler = 'poisson'": "every site that is free is kept at work",
    },
}
"""Reasons by choice and feature. A strategy without a row goes with the plain mean only."""


@dataclass(frozen=True)
class Bound:
    """A condition on numbers that a choice needs.

    Attributes:
        holds: Whether it is met.
        problem: What is wrong otherwise.
        fix: What to do.
    """

    holds: Question
    problem: str
    fix: str


_FEW_LIARS = Bound(
    lambda config: config.rounds.min_sites >= 2 * config.strategy.byzantine_sites + 3,
    "the rule needs n >= 2f + 3, with n = rounds.min_sites and f = strategy.byzantine_sites",
    "Raise rounds.min_sites, or lower strategy.byzantine_sites.",
)
_HONEST_MAJORITY = Bound(
    lambda config: config.rounds.min_sites > 2 * config.strategy.byzantine_sites,
    "the rule needs more than half of rounds.min_sites to be honest, so more than 2 strategy.byzantine_sites",
    "Raise rounds.min_sites, or lower strategy.byzantine_sites.",
)
_HONEST_WEIGHT = Bound(
    lambda config: (
        _HONEST_MAJORITY.holds(config)
        and (
            config.strategy.weighting == "uniform"
            or config.strategy.byzantine_sites * config.strategy.max_weight_share < 0.5
        )
    ),
    "the rule needs more than half of rounds.min_sites to be honest, and of the weight too: strategy.byzantine_sites times "
    "strategy.max_weight_share stays below a half",
    "Raise rounds.min_sites, lower strategy.byzantine_sites or strategy.max_weight_share, or set strategy.weighting to "
    "'uniform'.",
)
_ENOUGH_TRIMMED = Bound(
    lambda config: (
        num_trimmed(config.strategy.trim_fraction, config.rounds.min_sites) >= max(1, config.strategy.byzantine_sites)
    ),
    "strategy.trim_fraction of rounds.min_sites must leave out at least one value at either end, and as many as "
    "strategy.byzantine_sites",
    "Raise strategy.trim_fraction or rounds.min_sites.",
)
_ADAPTIVE = Bound(
    lambda config: config.strategy.server_optimizer != "sgd",
    "the strategy's server optimizer is adaptive",
    "Set strategy.server_optimizer to 'adam', with a strategy.server_learning_rate such as 0.01.",
)
_SOMEONE_TO_TRUST = Bound(
    lambda config: bool(config.strategy.trusted_site),
    "the rule needs a site to judge the others by",
    "Name one in strategy.trusted_site.",
)
_ALLOWED_RANKS = Bound(
    lambda config: all(
        (config.adapter.min_rank or config.adapter.rank) <= rank <= config.adapter.rank
        for rank in config.simulation.rank_list
    ),
    "ranks go from adapter.min_rank, or adapter.rank where that is 0, to adapter.rank",
    "Set adapter.min_rank to the smallest of them and adapter.rank to the largest.",
)
_ALLOWED_ALPHAS = Bound(
    lambda config: config.adapter.min_rank > 0 or set(config.simulation.alpha_list) == {config.adapter.alpha},
    "without adapter.min_rank, sites have no alpha of their own",
    "Set adapter.min_rank.",
)

_IN_TIME = Bound(
    lambda config: config.strategy.grouping_round <= config.num_rounds,
    "strategy.grouping_round lies after the last round",
    "Lower it, or raise num_rounds.",
)

_FILLS = Bound(
    lambda config: config.rounds.min_sites <= config.rounds.buffer_size,
    "a full buffer holds fewer updates than the quorum, rounds.min_sites",
    "Raise rounds.buffer_size, or lower rounds.min_sites.",
)

_OWN_ADAPTERS = Bound(
    lambda config: config.adapter.personal_rank > 0,
    "sites need a rank for the adapter of their own",
    "Set adapter.personal_rank, for example to adapter.rank.",
)
_TWO_ADAPTERS = Bound(
    lambda config: config.strategy.name == "feddpa",
    "only strategy.name = 'feddpa' trains a second adapter",
    "Remove it, or choose that strategy.",
)

BOUNDS: dict[str, Bound] = {
    "adapter.personal_rank": _TWO_ADAPTERS,
    "strategy.name = 'feddpa'": _OWN_ADAPTERS,
    "rounds.buffer_size": _FILLS,
    "strategy.name = 'fedpeptao'": _ADAPTIVE,
    "strategy.name = 'clustered'": _IN_TIME,
    "strategy.aggregator = 'median'": _HONEST_MAJORITY,
    "strategy.aggregator = 'trimmed-mean'": _ENOUGH_TRIMMED,
    "strategy.aggregator = 'krum'": _FEW_LIARS,
    "strategy.aggregator = 'multi-krum'": _FEW_LIARS,
    "strategy.aggregator = 'geometric-median'": _HONEST_WEIGHT,
    "strategy.aggregator = 'fltrust'": _SOMEONE_TO_TRUST,
    "simulation.ranks": _ALLOWED_RANKS,
    "simulation.alphas": _ALLOWED_ALPHAS,
}
"""Conditions by choice. `rounds.min_sites` is the fewest updates that a round is aggregated with."""


def _prunes(config: RunConfig) -> bool:
    return config.strategy.name == "hetlora" and config.adapter.min_rank > 0


EFFECTS: dict[str, Question] = {
    "adapter.min_rank": lambda config: config.adapter.kind == "lora",
    "simulation.ranks": lambda config: config.adapter.kind == "lora",
    "simulation.alphas": lambda config: config.adapter.kind == "lora",
    "rounds.max_staleness": lambda config: config.rounds.buffer_size > 0,
    "rounds.staleness_exponent": lambda config: config.rounds.buffer_size > 0,
    "simulation.prompt_lengths": lambda config: config.adapter.min_virtual_tokens > 0,
    "rounds.fraction": lambda config: config.rounds.sampler != "all",
    "rounds.over_selection": lambda config: config.rounds.sampler in ("uniform", "weighted"),
    "strategy.layer_share": lambda config: config.strategy.name == "fedpeptao",
    "strategy.proximal_mu": lambda config: config.strategy.name == "fedprox",
    "strategy.shared_depth": lambda config: config.strategy.name == "fedper",
    "strategy.personal_share": lambda config: config.strategy.name == "feddpa",
    "strategy.grouping_round": lambda config: config.strategy.name == "clustered",
    "strategy.max_groups": lambda config: config.strategy.name == "clustered",
    "strategy.alignment": lambda config: config.strategy.name == "fedrot",
    "strategy.pruning": _prunes,
    "strategy.tail_penalty": lambda config: _prunes(config) and config.strategy.pruning < 1,
    "strategy.byzantine_sites": lambda config: config.strategy.aggregator not in ("mean", "fltrust"),
    "strategy.trim_fraction": lambda config: config.strategy.aggregator == "trimmed-mean",
    "strategy.trusted_site": lambda config: config.strategy.aggregator == "fltrust",
    "strategy.robust_on": lambda config: config.strategy.aggregator != "mean" or config.strategy.norm_bound != 0,
    "strategy.weighting": heeds_weights,
    "strategy.max_weight_share": lambda config: heeds_weights(config) and config.strategy.weighting != "uniform",
    "strategy.energy_threshold": lambda config: config.strategy.name == "florist",
    "strategy.lossless": lambda config: config.strategy.name == "florist",
    "strategy.ridge": lambda config: config.strategy.name == "lora-fair",
    "simulation.attack_strength": lambda config: config.simulation.attack != "none",
    "simulation.backdoor_trigger": lambda config: config.simulation.attack == "backdoor",
    "simulation.backdoor_target": lambda config: config.simulation.attack == "backdoor",
}
"""Where a setting has an effect at all, by key."""


def check_compatibility(config: RunConfig) -> None:
    """Refuse what cannot work together.

    Raises:
        ConfigError: A pipeline is impossible, or a combination is refused; with the reason, and all reasons of the latter.
    """
    for key in ("uplink", "downlink"):
        _check_pipeline(key, getattr(config.transport, key))
    problems = [*_refused(config), *_out_of_bounds(config)]
    if problems:
        raise ConfigError(explain("; ".join(problems), where="run config"))


def without_effect(config: RunConfig) -> list[str]:
    """Return the keys that were changed from their default, but that the other choices leave without effect."""
    given, defaults = flatten(config), flatten(RunConfig())
    return [key for key, has_effect in EFFECTS.items() if given[key] != defaults[key] and not has_effect(config)]


def _check_pipeline(key: str, text: str) -> None:
    try:
        pipeline = parse(text)
    except ConfigError as error:
        raise ConfigError(f"transport.{key} cannot be used: {error}") from error
    if key == "downlink" and pipeline.has(Kind.MASK) and not pipeline.has(Kind.DIFFERENCE):
        fix = (
            "Put delta in front: the mask is taken from the state that sites hold, and what travels changes that state."
        )
        raise ConfigError(explain("a masked state must be a difference", found=text, where=f"transport.{key}", fix=fix))


def _refused(config: RunConfig) -> Iterator[str]:
    for choice in _choices(config):
        for feature, reason in REFUSALS.get(choice, _OWN_AGGREGATOR).items():
            if FEATURES[feature](config):
                yield f"{choice} cannot be combined with {feature}: {reason}"


def _out_of_bounds(config: RunConfig) -> Iterator[str]:
    for choice in _choices(config):
        bound = BOUNDS.get(choice)
        if bound and not bound.holds(config):
            yield f"{choice}: {bound.problem} ({bound.fix.rstrip('.')})"


def _choices(config: RunConfig) -> Iterator[str]:
    yield f"adapter.kind = {config.adapter.kind!r}"
    yield f"strategy.name = {config.strategy.name!r}"
    yield f"strategy.aggregator = {config.strategy.aggregator!r}"
    if config.strategy.norm_bound != 0:
        yield "strategy.norm_bound"
    if config.simulation.ranks and config.adapter.kind == "lora":
        yield "simulation.ranks"
    if config.simulation.alphas and config.adapter.kind == "lora":
        yield "simulation.alphas"
    if config.rounds.buffer_size:
        yield "rounds.buffer_size"
    if config.adapter.personal_rank:
        yield "adapter.personal_rank"


def _uplink_has(config: RunConfig, stage: str) -> bool:
    branches = parse(config.transport.uplink).branches
    return any(one.name == stage for _, branch in branches for one in branch.stages)
