"""The data owner's file: which data a site offers, where it keeps its state, on which device it works.

It is TOML on the site's own disk and never leaves it. The operator's run config and this file are two different models;
where both speak about data, this one wins (:meth:`SiteConfig.merged_data`). An example is ``deploy/site.example.toml``.

Evolution: sections and keys are only added, always with a default, so a file that works keeps working.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, Field, model_validator

from client_app.policy.settings import PolicySection, SharingSection
from fedllm.config import DataConfig, validated
from fedllm.data.sources import absolute
from fedllm.errors import ConfigError, explain
from fedllm.logs import LogFormat
from fedllm.model.spec import Section
from fedllm.observability.address import Address


class SiteSection(Section):
    """Who the site is."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """The site's stable name: letters, digits, `.`, `_`, `-`. It names state files and appears in reports."""


class SiteDataSection(Section):
    """The data that the site offers."""

    source: str = Field(pattern=r"^[a-z]+:.+$")
    """Where the examples are: `file:/path` (a file or folder), `hf:org/name`, `pkg:package/path`. A relative path counts
    from the folder of this file."""

    format: str = DataConfig.model_fields["format"].default
    """Shape of one example; `auto` detects it from the columns."""

    max_train_examples: int = Field(0, ge=0)
    """Upper bound on training examples, 0 for no bound of the site's own. The smaller of this and the run's holds."""


class AdapterSection(Section):
    """How much of the federation's adapter the site uses and trains, within the operator's bounds."""

    rank: int = Field(0, ge=0)
    """Rank of LoRA that the site trains, from the run's `adapter.min_rank` to its `adapter.rank`; 0 takes the latter. The
    other components it applies as they are."""

    alpha: float = Field(0.0, ge=0)
    """LoRA alpha that the site trains with, 0 for the run's. Its scale is inside what the server averages."""

    num_virtual_tokens: int = Field(0, ge=0)
    """Virtual tokens of a soft prompt that the site uses and trains, the first ones; 0 for all."""


class PathsSection(Section):
    """Where the site keeps files; relative paths count from the folder of this file."""

    state_dir: Path = Path("state")
    """Folder of what must survive a restart. It is as confidential as the data."""

    cache_dir: Path = Path("cache")
    """Folder of what can be made again, such as the quantized base."""


class HardwareSection(Section):
    """What the site lends to training."""

    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """`auto` (CUDA where there is one), `cpu`, or a device such as `cuda:0`."""

    num_threads: int = Field(0, ge=0)
    """CPU threads, 0 for the run's choice."""


class TransportSection(Section):
    """How the site reaches the server's update stream; without effect where a run's updates ride in Flower's messages."""

    address: str = ""
    """`host:port` to connect to, empty for the one that the server names."""

    ca: Path | None = None
    """PEM file of the federation's authority; none trusts the system's authorities."""

    certificate: Path | None = None
    """PEM file of the site's own certificate, where the server asks for one."""

    key: Path | None = None
    """PEM file of the private key that belongs to it."""

    insecure: bool = False
    """Let the update stream go unencrypted. Only for a closed network."""


class ObservabilitySection(Section):
    """How the site's own admin can watch it. Nothing of this is sent to the server."""

    metrics: str = ""
    """Address at which Prometheus may ask the site's service, such as `127.0.0.1:9301`; empty for none. Whoever reaches it
    can read the figures, so keep it to this machine or to your own network."""

    log_format: LogFormat = "text"
    """How the service and what it starts write their log: `text`, or `json` with one object a line."""

    @property
    def address(self) -> Address | None:
        """The address, None where there is none."""
        return Address.parse(self.metrics) if self.metrics else None

    @model_validator(mode="after")
    def _check_address(self) -> ObservabilitySection:
        if self.metrics:
            Address.parse(self.metrics)
        return self


class SiteConfig(Section):
    """Everything that a data owner decides."""

    site: SiteSection
    data: SiteDataSection
    adapter: AdapterSection = AdapterSection()
    paths: PathsSection = PathsSection()
    hardware: HardwareSection = HardwareSection()
    transport: TransportSection = TransportSection()
    policy: PolicySection = PolicySection()
    sharing: SharingSection = SharingSection()
    observability: ObservabilitySection = ObservabilitySection()

    home: Path
    """Folder of the file, which its relative paths count from; not a key of the file."""

    file: str = "site.toml"
    """The file's name, for messages; not a key of the file either."""

    def merged_data(self, run: DataConfig) -> DataConfig:
        """Return the run's data settings with the owner's in their place.

        Source and format are the owner's alone. Of two bounds on training examples the smaller holds. How much is held
        out, and how long sequences are, stay the run's, so that all sites are evaluated alike.
        """
        bounds = [bound for bound in (self.data.max_train_examples, run.max_train_examples) if bound]
        own = {"source": self.data.source, "format": self.data.format, "max_train_examples": min(bounds, default=0)}
        return validated(DataConfig, run.model_dump() | own, "site config and run config")


def load_site_config(path: Path) -> SiteConfig:
    """Read a site's file, with its paths made absolute.

    Raises:
        ConfigError: The file is missing or not TOML, a key is unknown (the nearest known key is named), or a value is
            refused.
    """
    values = _read_toml(path)
    _refuse_unknown_keys(values, path)
    home = path.absolute().parent
    config = validated(SiteConfig, values | {"home": home, "file": path.name}, str(path))
    config.merged_data(DataConfig())  # refuses an unknown format here and not in the first round
    data = config.data.model_copy(update={"source": absolute(config.data.source, home)})
    paths, transport = _absolute_paths(config.paths, home), _absolute_paths(config.transport, home)
    return config.model_copy(update={"paths": paths, "transport": transport, "data": data})


SectionT = TypeVar("SectionT", bound=Section)


def _absolute_paths(section: SectionT, home: Path) -> SectionT:
    paths = {name: value for name, value in section if isinstance(value, Path)}
    return section.model_copy(update={name: home / path.expanduser() for name, path in paths.items()})


def _read_toml(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        fix = "Copy deploy/site.example.toml and fill it in."
        raise ConfigError(
            explain("the site config cannot be read", found=error.strerror, where=path, fix=fix)
        ) from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise ConfigError(explain("the site config is not TOML", found=error, where=path)) from error


def _refuse_unknown_keys(values: Mapping[str, object], path: Path) -> None:
    known = [key for key in _keys(SiteConfig) if "." in key]
    for key in _flat(values):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            fix = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}."
            raise ConfigError(explain(f"unknown site config key {key!r}", where=path, fix=fix))


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _keys(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
