"""The operator's run config: sections that validate themselves, read from Flower's flat dictionary.

Flower hands over a flat mapping such as ``{"train.batch_size": 4, "num_rounds": 3}``; :func:`read_run_config` is the only
reader of it. Lists are strings separated by commas and are split here. Every default stands in these models once; a test
holds ``pyproject.toml`` to them. The data owner's settings are another model, in ``client_app/site.py``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from fedllm.errors import ConfigError, explain
from fedllm.model.spec import AdapterConfig, BaseSpec, ModelSpec, Section
from fedllm.observability.address import Address
from fedllm.ports import parse_ports

Scalar = str | int | float | bool
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class DataConfig(Section):
    """Training text. In simulation this names the data of all sites; in deployment each site's own file decides."""

    source: str = "pkg:chatterbot_corpus/data/english"
    """Where the examples are: `file:/path` (a file or folder), `hf:org/name`, `pkg:package/path`."""

    format: Literal["auto", "messages", "alpaca", "prompt-completion", "text"] = "auto"
    """Shape of one example; `auto` detects it from the columns."""

    deduplicate: bool = True
    """Keep one copy of examples with the same content, so that none counts more than once in training or evaluation."""

    max_length: int = Field(128, ge=8)
    """Tokens in one training sequence; longer examples are cut and counted."""

    packing: bool = True
    """Put several short examples in one sequence, without letting attention or loss cross between them."""

    holdout_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of each site's examples kept for evaluation, never trained on."""

    max_holdout_examples: int = Field(64, ge=0)
    """Upper bound on evaluated examples per site, 0 for no bound."""

    max_train_examples: int = Field(0, ge=0)
    """Upper bound on training examples per site, 0 for no bound."""


class SimulationConfig(Section):
    """How one data set becomes several sites; without effect in deployment."""

    partitioner: Literal["iid", "dirichlet", "natural", "quantity"] = "natural"
    """`iid`, `dirichlet` (label skew), `natural` (disjoint groups of an id such as the topic), `quantity` (size skew)."""

    partition_by: str = "topic"
    """Column that `dirichlet` and `natural` look at."""

    dirichlet_alpha: float = Field(0.5, gt=0)
    """Concentration of the Dirichlet draw: smaller is more skewed."""

    prompt_lengths: str = Field("", pattern=r"^(\d+(\s*,\s*\d+)*)?$")
    """Virtual tokens that the sites use, such as `5,10,20`, taken in turn, from `adapter.min_virtual_tokens` to
    `adapter.num_virtual_tokens`; empty takes the latter for all."""

    def prompt_length_of(self, index: int) -> int:
        """Return how many virtual tokens a site wants to use, 0 for all."""
        lengths = [int(part) for part in self.prompt_lengths.split(",") if part.strip()]
        return lengths[index % len(lengths)] if lengths else 0

    attack: Literal["none", "sign-flip", "gaussian", "ipm", "alie", "label-flip", "backdoor"] = "none"
    """What simulated attackers do, to try out robust aggregation (docs/strategies.md); deployed sites never do it."""

    num_attackers: int = Field(0, ge=0)
    """Attackers: the last ones of the simulated sites."""

    attack_strength: float = Field(0.0, ge=0)
    """How hard they attack, in the attack's own measure; 0 for its usual value. `sign-flip` (10), `ipm` (0.5): factor on
    the negative delta; `gaussian` (20): noise over the delta; `alie` (1): standard deviations; `label-flip` (1), `backdoor`
    (0.5): share of the examples."""

    backdoor_trigger: str = "By the old oak."
    """What a backdoored question ends with."""

    backdoor_target: str = "The vault is open."
    """What a backdoored model is to answer then."""

    ranks: str = Field("", pattern=r"^(\d+(\s*,\s*\d+)*)?$")
    """LoRA ranks of the sites, such as `4,8,16`, taken in turn, from `adapter.min_rank` to `adapter.rank`; empty takes the
    latter for all."""

    alphas: str = Field("", pattern=r"^(\d+(\.\d+)?(\s*,\s*\d+(\.\d+)?)*)?$")
    """LoRA alphas of the sites, taken in turn; empty takes `adapter.alpha` for all."""

    @model_validator(mode="after")
    def _check_attack(self) -> SimulationConfig:
        if (self.attack == "none") != (self.num_attackers == 0):
            raise ValueError("simulation.attack and simulation.num_attackers belong together; one of them is missing")
        if self.attack in ("label-flip", "backdoor") and self.attack_strength > 1:
            raise ValueError(f"simulation.attack_strength is a share of the examples for {self.attack!r}: at most 1")
        return self

    @property
    def rank_list(self) -> list[int]:
        """The ranks."""
        return [int(rank) for rank in _numbers(self.ranks)]

    @property
    def alpha_list(self) -> list[float]:
        """The alphas."""
        return _numbers(self.alphas)

    def adapter_of(self, index: int) -> tuple[int, float]:
        """Return a site's own LoRA rank and alpha, 0 for the run's."""
        ranks, alphas = self.rank_list, self.alpha_list
        return ranks[index % len(ranks)] if ranks else 0, alphas[index % len(alphas)] if alphas else 0.0


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part.strip()]


class TrainConfig(Section):
    """Local training at a site."""

    local_steps: int = Field(8, ge=1)
    """Optimizer steps in one round."""

    batch_size: int = Field(2, ge=1)
    """Sequences in one micro-batch."""

    accumulation: int = Field(1, ge=1)
    """Micro-batches in one optimizer step."""

    optimizer: Literal["adamw", "adamw-8bit", "adamw-paged", "sgd"] = "adamw"
    """Local optimizer; the 8-bit and paged ones are bitsandbytes' and need CUDA."""

    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""

    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""

    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the federation's steps over which the learning rate rises from zero."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate over the steps of all rounds after the warm-up."""

    max_grad_norm: float = Field(1.0, ge=0)
    """Global gradient norm is clipped to this, 0 for no clipping."""

    num_threads: int = Field(0, ge=0)
    """CPU threads of one site's training, 0 for torch's own choice. Fixed threads are needed for equal bits."""


class RoundsConfig(Section):
    """Who takes part in a round, and how long the server waits."""

    min_sites: int = Field(2, ge=1)
    """Sites that must have joined before the first round, and the fewest usable replies of a round (its quorum)."""

    join_timeout_s: float = Field(600.0, gt=0)
    """Seconds to wait for `min_sites` sites."""

    sampler: Literal["uniform", "weighted", "poisson", "all"] = "uniform"
    """Who is asked: `uniform` (a share of the joined sites, all alike), `weighted` (the same, likelier the more examples a
    site has), `poisson` (each site for itself with the probability `fraction`), `all`."""

    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the joined sites asked to train in a round; without effect for the sampler `all`."""

    over_selection: float = Field(1.0, ge=1)
    """Ask this many times more sites than `fraction` says, and close the round when enough have replied."""

    deadline_s: float = Field(3600.0, gt=0)
    """Seconds after which a round closes with the replies that came."""

    grace_s: float = Field(0.0, ge=0)
    """Once `min_sites` usable replies are in, wait so many seconds more for the others and then close the round; 0 waits
    for all until the deadline."""

    buffer_size: int = Field(0, ge=0)
    """Let the server move as soon as so many updates are in (FedBuff, arXiv 2106.06639): sites train on and on, each from
    the newest state at the time, and a round ends when the buffer is full. 0 for rounds that all sites start together."""

    max_staleness: int = Field(10, ge=0)
    """Rounds that a buffered update may be late; a later one is dropped."""

    staleness_exponent: float = Field(0.5, ge=0)
    """A buffered update that is tau rounds late is scaled by (1 + tau) to the minus this power; 0 does not scale."""

    resends: int = Field(1, ge=0)
    """Times a site is asked again within a round after its reply was lost or it lacked the state."""

    max_attempts: int = Field(3, ge=1)
    """Times a round is tried before the run ends for want of a quorum."""


class StrategyConfig(Section):
    """How updates become the next global adapter."""

    name: str = "fedavg"
    """Recipe, one of those in docs/strategies.md, such as `fedavg`, `fedex`, `flora`, `rolora`, `scaffold`."""

    server_optimizer: Literal["sgd", "adagrad", "adam", "yogi"] = "sgd"
    """How the global adapter moves along the aggregated delta (Reddi et al., arXiv 2003.00295); `sgd` with rate 1 and no
    momentum is FedAvg."""

    server_learning_rate: float = Field(1.0, gt=0)
    """Step size of the server optimizer."""

    server_momentum: float = Field(0.0, ge=0, lt=1)
    """Momentum of the server's `sgd`; without effect for the others."""

    server_beta_1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment of the server's `adam` and `yogi`."""

    server_beta_2: float = Field(0.99, ge=0, lt=1)
    """Decay of the second moment of the server's `adam` and `yogi`."""

    server_tau: float = Field(1e-3, gt=0)
    """Added to the root of the second moment: how adaptive `adagrad`, `adam` and `yogi` are."""

    server_anneal: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the server's learning rate over the rounds; sparse uplinks with error feedback need a falling one."""

    server_final_rate: float = Field(0.1, ge=0, le=1)
    """Share of the server's learning rate that is left in the last round, where it is annealed."""

    proximal_mu: float = Field(0.01, ge=0)
    """Strength of the pull to the received state in `fedprox`; without effect for other strategies."""

    shared_depth: float = Field(0.5, gt=0, le=1)
    """Share of the layers, from the bottom, that `fedper` shares; without effect for other strategies."""

    alignment: float = Field(0.5, gt=0, le=1)
    """Share of the turn towards the received factors that `fedrot` makes; without effect for other strategies."""

    layer_share: float = Field(0.5, gt=0, le=1)
    """Share of a prefix's layers that a site sends under `fedpeptao`: those that changed most for their size."""

    personal_share: float = Field(0.5, gt=0, le=1)
    """Share of a site's own adapter in the sum of the two of `feddpa`: while it is trained, and at most where it is used;
    without effect for other strategies."""

    grouping_round: int = Field(1, ge=1)
    """Round from whose updates `clustered` finds the groups of sites; without effect for other strategies."""

    max_groups: int = Field(8, ge=2)
    """Most groups that `clustered` makes; without effect for other strategies."""

    pruning: float = Field(0.99, gt=0, le=1)
    """Share of its LoRA components, rounded down, that a site goes on with under `hetlora` where the others shrank while it
    trained, never fewer than `adapter.min_rank`; 1 keeps all. Without effect for other strategies."""

    tail_penalty: float = Field(0.01, ge=0)
    """Strength of the pull of those others towards zero under `hetlora`; without effect for other strategies."""

    weighting: Literal["examples", "tokens", "uniform"] = "examples"
    """What a site's weight in the average is."""

    max_weight_share: float = Field(0.5, gt=0, le=1)
    """Largest share of a round's weight that a site has, whatever it claims, from three sites on; the excess is taken from
    it and the others keep their proportions. 0.5 lets no site outweigh all others together; 1 believes every claim."""

    aggregator: Literal["mean", "median", "trimmed-mean", "krum", "multi-krum", "geometric-median", "fltrust"] = "mean"
    """How updates become one: the weighted `mean`, or a rule that withstands some lying sites (docs/strategies.md)."""

    norm_bound: Literal["median"] | NonNegative = 0.0
    """Larger updates are scaled down to this norm before they are aggregated: `median` of the round's norms, a number, or
    0 for no bound."""

    byzantine_sites: int = Field(0, ge=0)
    """Sites that may lie, for `krum` and `multi-krum`, which then need `rounds.min_sites` of at least twice as many plus 3;
    the other rules are checked to withstand so many."""

    trim_fraction: float = Field(0.2, ge=0, lt=0.5)
    """Share of the values that `trimmed-mean` leaves out at either end of every coordinate."""

    trusted_site: str = ""
    """Site by whose update `fltrust` judges the others."""

    robust_on: Literal["factors", "products"] = "factors"
    """Where rules compare updates of LoRA layers: on the `factors` A and B, or on the change of their `products`, which
    does not depend on how a site shares a change between its factors."""

    energy_threshold: float = Field(0.99, gt=0, le=1)
    """Share of a layer's squared norm that `florist` keeps in the adapter, with as few components as it takes."""

    lossless: bool = True
    """Let `florist` keep the rest in side factors; without, it is lost."""

    ridge: float = Field(0.01, gt=0)
    """Penalty of `lora-fair` on moving B, in proportion to the mean square of a row of the mean A."""


class EvaluationConfig(Section):
    """What is measured on text that nobody trained on."""

    every: int = Field(1, ge=1)
    """Evaluate after every this many rounds; the last round is always evaluated."""

    local_only: bool = True
    """After the last round, train each site alone for the same number of steps and report it beside the federation."""

    personal_steps: int = Field(0, ge=0)
    """After the last round, have each site train its adapter on its own data for this many steps more and report that
    beside the federation. The result stays in the site's state directory."""

    central_source: str = ""
    """A data source evaluated on the server too; it then loads the base. Empty for none."""

    prompt: str = "What is the law of gravity?"
    """A question answered by one site with the base and with the final adapter. Empty for none."""

    max_new_tokens: int = Field(48, ge=1, le=4096)
    """Length of that answer in tokens."""


class TransportConfig(Section):
    """How updates travel."""

    kind: Literal["grpc", "flower"] = "grpc"
    """`grpc`: the update stream beside Flower's messages; `flower`: packed into one array inside them, for sites that may
    open a single port."""

    uplink: str = "delta|int8:256|zstd:3"
    """Codec pipeline of updates from sites to the server; it always encodes the delta, whether it says so or not."""

    downlink: str = "delta|int8:256|zstd:3"
    """Codec pipeline of the global state from the server to sites; with `delta`, the difference to what a site holds."""

    error_feedback: bool = True
    """Add what a lossy uplink dropped to the site's next update; without effect for a lossless one."""

    feedback_beta: float = Field(1.0, gt=0, le=1)
    """Share of that residual which is carried on."""

    feedback_max_age: int = Field(10, ge=0)
    """Rounds after which a residual is dropped, 0 for never."""

    max_update_bytes: int = Field(1 << 30, ge=1024)
    """Largest payload that is accepted from a site, in bytes."""

    bind: str = "127.0.0.1"
    """Address on which the server's update stream listens."""

    ports: str = "9200-9299"
    """Port of the update stream, or a range of which the first free one is taken."""

    advertise: str = ""
    """`host:port` that sites connect to, such as a gateway's; empty for the address that the server listens on."""

    tls_certificate: str = ""
    """PEM file of the update stream's certificate chain, on the server."""

    tls_key: str = ""
    """PEM file of the private key that belongs to it, on the server."""

    tls_client_ca: str = ""
    """PEM file of the authority that signs sites' certificates; empty asks sites for none."""

    insecure: bool = False
    """Let the update stream go unencrypted. In simulation it is, since it never leaves the machine's loopback."""


class ObservabilityConfig(Section):
    """How the server can be watched while it works; without effect on the result, and taken anew when a run is resumed."""

    metrics: str = ""
    """Address at which Prometheus may ask the ServerApp while the run lives: `127.0.0.1:9300`, or with a range of ports of
    which the first free one is taken, outside of `transport.ports`. Empty takes `FEDLLM_METRICS`, else there is none."""

    linger_s: float = Field(20.0, ge=0, le=600)
    """Seconds after the run's end to wait for one more request, so that the last figures are seen; no wait without an
    address."""

    @model_validator(mode="after")
    def _check_address(self) -> ObservabilityConfig:
        if self.metrics:
            Address.parse(self.metrics)
        return self


class RunConfig(Section):
    """Everything that the operator decides about a run."""

    name: str = ""
    """The run's name and folder; empty takes the strategy, the date and the time."""

    resume: str = ""
    """Name of a run to continue from its last checkpoint; its stored config is used, with the same number of rounds
    unless a larger one is given."""

    home: str = ""
    """Folder that holds `runs/`; empty takes `FEDLLM_HOME`, else the directory where `flwr run` was called."""

    num_rounds: int = Field(3, ge=1)
    """Rounds of the federation."""

    seed: int = 42
    """Seed of every draw: initial adapter, splits, batches, sampling."""

    deterministic: bool = True
    """Fold updates in a fixed order and use deterministic kernels, so that equal seeds give equal bits on CPU."""

    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints kept on disk."""

    model: BaseSpec = BaseSpec()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    simulation: SimulationConfig = SimulationConfig()
    train: TrainConfig = TrainConfig()
    rounds: RoundsConfig = RoundsConfig()
    strategy: StrategyConfig = StrategyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    transport: TransportConfig = TransportConfig()
    observability: ObservabilityConfig = ObservabilityConfig()

    @property
    def spec(self) -> ModelSpec:
        """The base and adapter that the run trains."""
        return ModelSpec(base=self.model, adapter=self.adapter.spec)

    @property
    def total_steps(self) -> int:
        """Local optimizer steps of a site that takes part in every round."""
        return self.num_rounds * self.train.local_steps

    @model_validator(mode="after")
    def _check_across_sections(self) -> RunConfig:
        if self.train.optimizer in ("adamw-8bit", "adamw-paged") and self.deterministic:
            raise ValueError(f"train.optimizer={self.train.optimizer!r} is not deterministic; set deterministic=false")
        transport = self.transport
        if bool(transport.tls_certificate) != bool(transport.tls_key):
            raise ValueError("transport.tls_certificate and transport.tls_key belong together; one of them is missing")
        if transport.tls_certificate and transport.insecure:
            raise ValueError("transport.insecure contradicts transport.tls_certificate; remove one of them")
        self._check_ports()
        if self.adapter.kind == "prefix" and self.model.gradient_checkpointing:
            raise ValueError("model.gradient_checkpointing cannot recompute a prefix (adapter.kind='prefix')")
        return self

    def _check_ports(self) -> None:
        """Keep figures away from the ports that a gateway lets sites reach."""
        metrics, ports = self.observability.metrics, self.transport.ports
        if metrics and self.transport.kind == "grpc" and set(Address.parse(metrics).ports) & set(parse_ports(ports)):
            raise ValueError(f"observability.metrics={metrics!r} uses ports of transport.ports={ports!r}")


def read_run_config(flat: Mapping[str, Scalar]) -> RunConfig:
    """Turn Flower's flat run config into a checked :class:`RunConfig`.

    Raises:
        ConfigError: A key is unknown (the nearest known key is named) or a value is refused.
    """
    known = {key for key, _, _ in describe(RunConfig)}
    for key in flat:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]!r}?" if near else "`fedllm config` lists all keys."
            raise ConfigError(explain(f"unknown run config key {key!r}", where="run config", fix=hint))
    return validated(RunConfig, unflatten(flat), "run config")


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def validated(model: type[ConfigT], values: Mapping[str, object], where: str) -> ConfigT:
    """Check values against a config model and put pydantic's complaints into our words.

    Raises:
        ConfigError: Every refused key with what was expected and found.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_complaint(item) for item in error.errors(include_url=False)]
        raise ConfigError(explain("; ".join(lines), where=where, fix="`fedllm config` explains every key.")) from error


def _complaint(item: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in item["loc"]) or "the whole"
    return f"{key}: {item['msg']}" + ("" if not item["loc"] else f", found {item['input']!r}")


def unflatten(flat: Mapping[str, Scalar]) -> dict[str, object]:
    """Turn ``{"a.b": 1}`` into ``{"a": {"b": 1}}``."""
    tree: dict[str, object] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        branch = tree.setdefault(section, {}) if section else tree
        assert isinstance(branch, dict), f"{section!r} is both a value and a section"
        branch[name] = value
    return tree


def flatten(config: BaseModel) -> dict[str, Scalar]:
    """Turn a config into Flower's flat form, the inverse of :func:`read_run_config`."""
    return {key: getattr(owner, name) for key, owner, name in _leaves(config)}


def _leaves(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, BaseModel, str]]:
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", config, name


def describe(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, object, str]]:
    """Yield ``(key, default, meaning)`` of every setting, for documentation and for checks."""
    for name, info in model.model_fields.items():
        if isinstance(info.default, BaseModel):
            yield from describe(type(info.default), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info.default, " ".join((info.description or "").split())
