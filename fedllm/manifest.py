"""What a run is, apart from its results: the file ``manifest.json``."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedllm.config import RunConfig, Scalar, flatten, read_run_config
from fedllm.errors import CheckpointError, explain
from fedllm.files import atomic_write
from fedllm.provenance import versions


class SiteCounts(BaseModel):
    """How much data a site has: counts only, never content."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    train_examples: int = 0
    train_tokens: int = 0
    """Tokens that count in the loss, of all training examples."""
    holdout_examples: int = 0
    holdout_tokens: int = 0
    """Tokens that count in the loss, of all held-out examples."""


class Manifest(BaseModel):
    """What a run is, apart from its results. Unknown keys are ignored, so an older release reads a newer manifest."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    name: str
    """The run's name, that of its folder."""

    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """When the folder was made: ISO 8601 with offset."""

    flower_run_ids: tuple[int, ...] = ()
    """Flower's ids of the run and of each resumption, oldest first."""

    config: dict[str, Scalar]
    """The whole run config in Flower's flat form."""

    versions: dict[str, str] = Field(default_factory=versions)
    """Releases of the software on the server."""

    git_revision: str | None = None
    """Commit of the app's source, None outside git."""

    base_fingerprint: str = ""
    """Fingerprint of the base that all sites agreed on, empty before they did."""

    num_parameters: int = 0
    """Trained parameters of the adapter."""

    sites: dict[str, SiteCounts] = {}
    """Each site's amount of data."""

    seeds: dict[str, int] = {}
    """Seeds of the run by purpose."""

    format_version: int = 1
    """Raised when the meaning of a key changes."""

    @classmethod
    def of(cls, name: str, config: RunConfig, **fields: Any) -> Manifest:
        """Return a new run's manifest."""
        return cls(name=name, config=flatten(config), seeds={"run": config.seed}, **fields)

    @property
    def run_config(self) -> RunConfig:
        """The run config, checked anew.

        Raises:
            ConfigError: This release does not know a key or refuses a value.
        """
        return read_run_config(self.config)

    def write(self, path: Path) -> None:
        """Replace the file atomically."""
        atomic_write(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read what :meth:`write` wrote.

        Raises:
            CheckpointError: The file is missing or is not a manifest.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise CheckpointError(explain("a run's manifest cannot be read", found=error, where=path)) from error
