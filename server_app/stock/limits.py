"""What a strategy can do in somebody else's Flower app, where sites run that app's own ClientApp.

Such a site trains what it gets and sends back all of it, or the tensors that it was told to train. A recipe that rests on
more than that is refused before the first round. Refusal is the default: a kind of work, or a part of a strategy, that is
not listed here is refused too, so that nothing is left out of an algorithm without a word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from fedllm.config import RunConfig, Scalar
from fedllm.errors import ConfigError, explain
from fedllm.work import ClientWork
from strategies.slots import Strategy

SETTINGS = (
    "strategy.",
    "adapter.kind",
    "adapter.rank",
    "adapter.alpha",
    "adapter.rslora",
    "rounds.min_sites",
    "rounds.join_timeout_s",
    "rounds.max_attempts",
    "rounds.sampler",
    "rounds.fraction",
    "evaluation.every",
    "num_rounds",
    "seed",
)
"""Keys of the run config, or beginnings of keys, that mean something there."""

_KEEPS = "sites keep tensors of their own from round to round"
NEEDS_OUR_CLIENT: Mapping[str, str] = {
    "private": _KEEPS,
    "shared_depth": _KEEPS,
    "control_variates": "sites correct every step by control variates, and send how these changed",
    "personal_share": _KEEPS,
    "share": "a site chooses which layers it sends",
}
"""Reasons by field of :class:`ClientWork`."""

_DONE = ("trainable", "proximal", "alignment", "carries_residual", "truncates")
"""Fields that are told to the site, done by the server in its place, or without meaning where all arrays travel whole."""

_SLOTS = ("name", "sampler", "work", "aggregator", "optimizer", "is_exact")
_PARTS: Mapping[str, str] = {
    "buffer": "sites train on and on, and Flower's loop waits for all of a round",
    "grouping": "groups of sites have a global adapter each, and Flower's loop has one for all",
    "side_rank": "sites apply side factors beside the adapter, in place of changing the base",
    "num_heads": "sites train a square matrix between the factors",
}


def check_settings(settings: Mapping[str, Scalar], config: RunConfig) -> None:
    """Refuse settings that only our own round loop and sites follow.

    Args:
        settings: Those that were given.
        config: What they make.

    Raises:
        ConfigError: Some would have no effect, or rest on what a stock app does not say.
    """
    if ignored := sorted(key for key in settings if not key.startswith(SETTINGS)):
        fix = "Leave them out: the app decides about its model, data, training and transport."
        raise ConfigError(explain("settings without effect in a stock app", found=", ".join(ignored), fix=fix))
    if config.rounds.sampler == "weighted":
        reason = "sites say how many examples they have with their updates only"
        raise ConfigError(explain(f"a stock app cannot draw by size: {reason}", where="rounds.sampler"))
    if config.strategy.aggregator == "fltrust":
        reason = "nodes have no names that last, so none can be trusted by name"
        raise ConfigError(explain(f"a stock app cannot use fltrust: {reason}", where="strategy.aggregator"))


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy whose parts or first rounds need our own loop or ClientApp.

    Raises:
        ConfigError: With the reason.
    """
    strange = [_reason(field.name, _PARTS) for field in _changed(strategy) if field.name not in _SLOTS]
    if strange:
        raise _refusal(strategy.name, strange[0])
    for round_ in (1, 2):
        check_work(strategy.name, strategy.work.at(round_))


def check_work(name: str, work: ClientWork) -> None:
    """Refuse what a stock site does not do.

    Args:
        name: The strategy's name.
        work: What it asks of a site.

    Raises:
        ConfigError: With the reason.
    """
    plain = ClientWork()
    for field in ClientWork.model_fields:
        if getattr(work, field) != getattr(plain, field) and field not in _DONE:
            raise _refusal(name, _reason(field, NEEDS_OUR_CLIENT))


def _changed(strategy: Strategy) -> Iterator[dataclasses.Field[object]]:
    for field in dataclasses.fields(strategy):
        if field.default is dataclasses.MISSING or getattr(strategy, field.name) != field.default:
            yield field


def _reason(field: str, known: Mapping[str, str]) -> str:
    return known.get(field, f"it asks for {field!r}, which needs fedllm's own loop or ClientApp")


def _refusal(name: str, reason: str) -> ConfigError:
    fix = "Run it as a fedllm app (`flwr run` in this project), or choose another (docs/flower-apps.md)."
    return ConfigError(explain(f"{name!r} cannot run in a stock app: {reason}", where="strategy.name", fix=fix))
