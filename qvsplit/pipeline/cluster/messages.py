"""What a run and its driver process say to each other. All of it is pickled; standard library, and what a run has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from qvsplit.pipeline.devices import StoreDeclares
from qvsplit.pipeline.items import Result
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.pipeline.runner import RunnerOptions
from qvsplit.sources.source import Entry
from qvsplit.store.config import Provenance
from qvsplit.store.row import Row
from qvsplit.store.schema import ShardSchema
from qvsplit.store.staging import Staging

# ------------------------------------------------------------------------------------------------- from the run


@dataclass(frozen=True)
class Begin:
    """Join the cluster, and declare.

    Attributes:
        options: Of the extraction; paths are absolute.
        bounds: Of reading.
        own: What the store declares.
        generation: Of every row.
        staging: Where shards are written.
        seconds_left: After which no item is begun; None: there is no such time.
    """

    options: ExtractOptions
    bounds: RunnerOptions
    own: StoreDeclares
    generation: int
    staging: Staging
    seconds_left: float | None


@dataclass(frozen=True)
class Entries:
    """Items that are to be run; several such, before `Run`."""

    entries: Sequence[Entry]


class Run:
    """Run them."""


class Finish:
    """Begin no further item; write what has left the encoders."""


# --------------------------------------------------------------------------------------------- from the driver


@dataclass(frozen=True)
class Declared:
    """What the first encoder of a run says of itself, and of all that follow.

    Attributes:
        schema: What shards declare.
        provenance: Of its features.
        model: The checkpoint as a person would name it.
        notes: What the user should know.
        encoder_bytes, weights_bytes_read, patch_budget: As a summary has them.
        seconds: What loading took, by its parts.
    """

    schema: ShardSchema
    provenance: Provenance
    model: str
    notes: tuple[str, ...] = ()
    encoder_bytes: int = 0
    weights_bytes_read: int = 0
    patch_budget: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Described:
    """What has become of some items that left an encoder, or need none."""

    results: Sequence[Result]


@dataclass(frozen=True)
class Shard:
    """A staged shard that is whole.

    Attributes:
        name: In the run's staging folder.
        size: In bytes.
        rows: Of each item that it has.
    """

    name: str
    size: int
    rows: Sequence[Sequence[Row]]


@dataclass(frozen=True)
class Done:
    """All items have been run, or what could be finished has been.

    Attributes:
        stopped: "max-runtime" where that left items.
        seconds: What was waited for, by stage.
    """

    stopped: str
    seconds: dict[str, float]


@dataclass(frozen=True)
class Failed:
    """The run cannot go on.

    Attributes:
        error: Why: a QvsplitError, or of a bug what was raised.
        trace: Where, if that is a bug.
    """

    error: Exception
    trace: str = ""


ToDriver: TypeAlias = "Begin | Entries | Run | Finish"
FromDriver: TypeAlias = "Declared | Described | Shard | Done | Failed"
