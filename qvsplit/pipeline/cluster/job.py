"""What every process of a cluster has to know of a run: small, picklable, and all it needs to begin again."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from qvsplit.errors import ConfigError, some_of
from qvsplit.pipeline.devices import StoreDeclares
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.pipeline.runner import RunnerOptions
from qvsplit.store.config import installed_versions
from qvsplit.store.staging import Staging


@dataclass(frozen=True)
class Job:
    """One run on a cluster, as its processes have it.

    Attributes:
        options: Of the extraction, with the device that an encoder has in its process.
        bounds: Of reading.
        own: What the store declares: what encoders are held against.
        generation: Of every row.
        staging: Where shards are written.
        threads: Of an encoder on CPUs.
        ends_at: By the machines' clocks, after which no item is begun; None: never.
    """

    options: ExtractOptions
    bounds: RunnerOptions
    own: StoreDeclares
    generation: int
    staging: Staging
    threads: int
    ends_at: float | None = None

    def check_node(self) -> None:
        """Refuse a machine that would give other features, or write elsewhere: it has other libraries, or disks.

        Raises:
            ConfigError: Other versions of what touches pixels or numbers than where the run's first encoder is.
            DiskError: The run's staging folder is not there.
        """
        self.staging.check()
        declared = self.own.provenance.versions if self.own.provenance is not None else {}
        mine = installed_versions()
        names = sorted(name for name in {*declared, *mine} if declared.get(name) != mine.get(name))
        if names:
            differ = (f"{name} {mine.get(name)} instead of {declared.get(name)}" for name in names)
            raise ConfigError(
                f"{socket.gethostname()} has other versions than the rest of the cluster ({some_of(differ)}); install "
                "the same on every node"
            )
