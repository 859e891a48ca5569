"""Our strategies as plain strategies of Flower, for an app whose server and clients know nothing else of this project.

::

    from server_app.stock.strategy import stock_strategy

    strategy = stock_strategy({"strategy.name": "fedavg", "strategy.server_optimizer": "adam",
                               "strategy.server_learning_rate": 0.01, "adapter.rank": 8})
    result = strategy.start(grid, initial_arrays=ArrayRecord(adapter_state_dict), num_rounds=3)

Messages are those of Flower's own strategies: ``arrays`` and ``config`` go to a site, ``arrays`` and ``metrics`` with
``num-examples`` come back. The config record says, besides ``server-round``:

- ``trainable``: names of the arrays that are trained in this round, where not all are (FFA-LoRA, RoLoRA). A site leaves the
  others as they came, or out of its reply; a reply that changed one is rejected.
- ``proximal-mu``: strength of the pull towards what was received (FedProx), as Flower's own FedProx says it.

What a fedllm site would do to a finished update, the server does here (FedRot's alignment). What needs more of a site is
refused (:mod:`server_app.stock.limits`). A bad reply is named, dropped, and changes nothing; a round with too few usable
ones leaves the arrays as they are. All of a round's replies are in memory, since Flower's loop collects them in a list;
our own app does not (docs/architecture.md).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedllm.config import RunConfig, Scalar, read_run_config
from fedllm.errors import ConfigError, LayoutError, QuorumError, UpdateError, explain
from fedllm.update import Arrays, Contribution, Layout
from server_app.stock import records
from server_app.stock.limits import check_settings, check_strategy, check_work
from server_app.stock.replies import Standing, Trained, content_of, usable_replies
from strategies.compatibility import check_compatibility, without_effect
from strategies.registry import build_strategy
from strategies.slots import ArraySource, OptimizerState, Origin, Strategy
from strategies.weights import bounded, cut, heeds_weights

log = logging.getLogger("flwr.fedllm")  # below Flower's own logger, so that our lines stand among its lines

ARRAYS, CONFIG = "arrays", "config"
WEIGHT_KEYS = {"examples": "num-examples", "tokens": "num-tokens", "uniform": ""}
POLL_S = 1.0


def stock_strategy(settings: Mapping[str, Scalar] | None = None) -> StockStrategy:
    """Build a strategy from settings of the run config (docs/configuration.md), the others being the defaults.

    Args:
        settings: Such as ``{"strategy.name": "rolora", "adapter.rank": 8}``. ``num_rounds`` matters where the server's
            rate falls over the rounds and is to be that of `start`.

    Raises:
        ConfigError: A setting is unknown, refused or without effect, or the strategy needs fedllm's own loop or ClientApp.
    """
    config = read_run_config(dict(settings or {}))
    check_settings(settings or {}, config)
    strategy = build_strategy(config)
    check_strategy(strategy)
    check_compatibility(config)
    for key in without_effect(config):
        log.warning("%s has no effect with these settings", key)
    return StockStrategy(strategy, config)


@dataclass
class StockStrategy(FlowerStrategy):
    """Four slots behind Flower's five methods; :func:`stock_strategy` builds one.

    The server optimizer's memory is kept from round to round; round 1 begins anew.

    Args:
        strategy: The slots.
        config: The settings that it was built from.
    """

    strategy: Strategy
    config: RunConfig
    _standing: Standing | None = field(default=None, init=False)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose the nodes of a round and tell them what to train.

        Raises:
            QuorumError: Fewer than `rounds.min_sites` nodes are there within `rounds.join_timeout_s`.
            ConfigError: The strategy does not fit the arrays.
        """
        nodes = self._gathered(grid)
        standing = self._standing = self._at(server_round, arrays, len(nodes))
        told = ConfigRecord({**config, "server-round": server_round, **_told(standing)})
        asked = self._chosen(nodes, server_round)
        log.info("configure_train: Sampled %d nodes (out of %d)", len(asked), len(nodes))
        return _messages(asked, arrays, told, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Make the next global arrays of a round's replies; without enough usable ones there are none.

        Raises:
            LayoutError: The strategy needs pairs of LoRA factors, and the arrays are not named as such.
        """
        standing = self._standing
        assert standing is not None, "configure_train comes first"
        assert standing.round == server_round, "replies belong to the round that was configured"
        usable = usable_replies(standing, replies, WEIGHT_KEYS[self.config.strategy.weighting])
        if len(usable) < self.config.rounds.min_sites:
            log.warning("only %d usable replies (rounds.min_sites); the arrays stay as they were", len(usable))
            return None, None
        try:
            delta, measured = self._aggregated(standing, usable)
        except LayoutError:  # not a reply's fault: the strategy and the app's arrays do not go together
            raise
        except UpdateError as error:
            log.warning("the updates cannot be aggregated, the arrays stay as they were: %s", error)
            return None, None
        params, optimizer = self.strategy.optimizer.apply(standing.optimizer, standing.params, delta)
        self._standing = replace(standing, params=params, optimizer=optimizer)
        metrics = _mean_metrics([(one.weight, one.metrics) for one in usable.values()])
        metrics.update({name: float(value) for name, value in measured.items()})
        return records.to_record(params, standing.layout), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask all connected nodes to evaluate, after every `evaluation.every` rounds and the last."""
        if server_round % self.config.evaluation.every and server_round != self.config.num_rounds:
            return []
        told = ConfigRecord({**config, "server-round": server_round})
        return _messages(sorted(grid.get_node_ids()), arrays, told, MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the means of what the sites measured, weighted by examples."""
        rows = []
        for reply in replies:
            try:
                metrics = records.only_metrics(content_of(reply))
                rows.append((records.weight_of(metrics, WEIGHT_KEYS["examples"]), metrics))
            except UpdateError as error:
                log.warning("round %d: no score of node %d: %s", server_round, reply.metadata.src_node_id, error)
        return _mean_metrics(rows) if rows else None

    def summary(self) -> None:
        """Log what the strategy is."""
        section, rounds = self.config.strategy, self.config.rounds
        log.info("\t├──> fedllm: %s", self.strategy.name)
        log.info("\t│\t├── Aggregator: %s (weights: %s)", section.aggregator, section.weighting)
        log.info("\t│\t└── Server optimizer: %s, rate %g", section.server_optimizer, section.server_learning_rate)
        log.info("\t└──> Sampler: %s, at least %d nodes", rounds.sampler, rounds.min_sites)

    def _gathered(self, grid: Grid) -> list[int]:
        """Wait until enough nodes are connected."""
        rounds = self.config.rounds
        end = time.monotonic() + rounds.join_timeout_s
        while len(nodes := sorted(grid.get_node_ids())) < rounds.min_sites:
            if time.monotonic() > end:
                expected = f"{rounds.min_sites} (rounds.min_sites)"
                raise QuorumError(explain("too few nodes are connected", expected=expected, found=len(nodes)))
            log.info("Waiting for nodes to connect: %d connected (minimum required: %d).", len(nodes), rounds.min_sites)
            time.sleep(POLL_S)
        return nodes

    def _chosen(self, nodes: list[int], round_: int) -> list[int]:
        """Draw the nodes of a round, again where they are too few."""
        names, rounds = {str(node): 1 for node in nodes}, self.config.rounds
        for attempt in range(1, rounds.max_attempts + 1):
            chosen = self.strategy.sampler.select(names, round_, attempt)
            if len(chosen) >= rounds.min_sites:
                return [int(name) for name in chosen]
        expected = f"{rounds.min_sites} (rounds.min_sites)"
        raise QuorumError(explain("too few nodes were drawn, again and again", expected=expected, found=len(chosen)))

    def _at(self, round_: int, arrays: ArrayRecord, num_nodes: int) -> Standing:
        """Return where a round starts from.

        Raises:
            ConfigError: The strategy does not fit the arrays.
            LayoutError: The arrays are not float32, or not those of the round before.
        """
        layout = records.layout_of(arrays)
        work = self.strategy.work.at(round_)
        check_work(self.strategy.name, work)
        work.sent(layout)  # refuses arrays that leave nothing to train
        self._check_rank(layout)
        params = records.to_arrays(arrays, layout, "the global arrays")
        before = self._standing if round_ > 1 else None
        if before and before.layout != layout:
            raise ConfigError(explain("the arrays changed between rounds", expected="the same names and shapes"))
        return Standing(round_, layout, params, work, num_nodes, before.optimizer if before else OptimizerState())

    def _check_rank(self, layout: Layout) -> None:
        ranks = {spec.shape[0] for spec in layout.tensors if spec.role == "lora_A"}
        if ranks - {self.config.adapter.rank}:
            fix = "Set adapter.rank and adapter.alpha as the app's LoRA config has them."
            expected = f"adapter.rank = {self.config.adapter.rank}"
            raise ConfigError(explain("LoRA arrays of another rank", expected=expected, found=sorted(ranks), fix=fix))

    def _aggregated(self, standing: Standing, usable: Mapping[str, Trained]) -> tuple[Arrays, Mapping[str, float]]:
        """Fold the updates in the order of the nodes' names."""
        origin = Origin(standing.round, standing.layout, standing.params, standing.params, standing.num_nodes)
        weights = self._weights(standing.round, {name: one.weight for name, one in usable.items()})
        aggregation = self.strategy.aggregator.start(standing.work.sent(standing.layout), origin)
        for name in sorted(usable):
            one = usable[name]
            aggregation.fold(ArraySource(one.delta), Contribution(name, weights[name], {}))
        return aggregation.finish()

    def _weights(self, round_: int, claims: Mapping[str, float]) -> Mapping[str, float]:
        """Return what the nodes weigh, none more than `strategy.max_weight_share` of all."""
        if not heeds_weights(self.config):
            return claims
        weights = bounded(claims, self.config.strategy.max_weight_share)
        for one in cut(claims, weights):
            claim = f"claims {one.claimed:.1%} of the weight and counts {one.counted:.1%}"
            log.warning("round %d: node %s %s (strategy.max_weight_share)", round_, one.site, claim)
        return weights


def _messages(nodes: Iterable[int], arrays: ArrayRecord, told: ConfigRecord, kind: str) -> list[Message]:
    content = RecordDict({ARRAYS: arrays, CONFIG: told})
    return [Message(content, dst_node_id=node, message_type=kind) for node in nodes]


def _told(standing: Standing) -> dict[str, list[str] | float]:
    """Return what a site is told of its work beside Flower's own words."""
    told: dict[str, list[str] | float] = {}
    trained = standing.work.trained(standing.layout)
    if trained != standing.layout:
        told["trainable"] = list(trained.names)
    if standing.work.proximal:
        told["proximal-mu"] = standing.work.proximal
    return told


def _mean_metrics(rows: list[tuple[float, MetricRecord]]) -> MetricRecord:
    return records.mean_metrics(rows, [key for key in WEIGHT_KEYS.values() if key])
