"""What the doctor looks at: one site, and the run that it is to serve."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from client_app.site import SiteConfig
from fedllm.config import DataConfig, RunConfig
from fedllm.errors import ModelError
from fedllm.model.source import BaseFiles, resolve
from fedllm.wire.tls import TlsConfig

if TYPE_CHECKING:
    from fedllm.model.footprint import Footprint


@dataclass(frozen=True)
class Case:
    """A site and what is asked of it.

    Attributes:
        owner: The data owner's file.
        run: The operator's run config, or its defaults.
        server: ``host:port`` that sites connect to, empty where it is not known.
        fingerprint: The federation's fingerprint of the base, empty where it is not known.
    """

    owner: SiteConfig
    run: RunConfig = field(default_factory=RunConfig)
    server: str = ""
    fingerprint: str = ""

    @property
    def updates(self) -> str:
        """``host:port`` of the update service, empty where it is not known."""
        return self.owner.transport.address or self.server

    @property
    def tls(self) -> TlsConfig | None:
        """The site's certificates, None where it goes unencrypted."""
        section = self.owner.transport
        return None if section.insecure else TlsConfig(section.ca, section.certificate, section.key)

    @cached_property
    def files(self) -> BaseFiles | None:
        """The base's files, None where they are not on this machine."""
        try:
            return resolve(self.run.model.source, self.owner.home, download=False)
        except ModelError:
            return None

    @cached_property
    def footprint(self) -> Footprint | str:
        """What training needs, or why that is not known."""
        from fedllm.model.build import read_architecture
        from fedllm.model.footprint import estimate

        if self.files is None:
            return "the base is not here"
        train, length = self.run.train, self.run.data.max_length
        try:
            config, spec = read_architecture(self.files), self.run.spec
            return estimate(config, spec, batch_size=train.batch_size, max_length=length, optimizer=train.optimizer)
        except ModelError as error:
            return str(error)

    @cached_property
    def data(self) -> DataConfig:
        """The run's data settings with the owner's in their place."""
        return self.owner.merged_data(self.run.data)
