"""What goes through an extraction: an item on its way, the pieces of it that are encoded, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qvsplit.errors import ItemError
from qvsplit.models.preparing import Prepared
from qvsplit.models.sampling import Clip
from qvsplit.pipeline.parts import Part, Parts
from qvsplit.sources.files import FileInfo
from qvsplit.sources.images import DecodedImage
from qvsplit.sources.source import Entry
from qvsplit.sources.videos import VideoInfo
from qvsplit.store.features import Features
from qvsplit.store.row import Content, Row


class Known:
    """The outcome of an item whose content needs no encoding: it is held already, or in flight."""


KNOWN = Known()


@dataclass(frozen=True)
class Staged:
    """The outcome of an item whose rows and features go into a shard that is not in the store yet.

    Attributes:
        rows: Its rows, by part.
        videos: How videos were looked at, as the extraction config has it, where it is one.
        shard: The staged shard that has this item alone, where it is too large to share one.
        bytes: Of its features before compression.
    """

    rows: tuple[Row, ...]
    videos: Mapping[str, Any] | None = None
    shard: str | None = None
    bytes: int = 0


@dataclass
class Result:
    """One item on its way, and in the end its outcome.

    Attributes:
        entry: As it was listed.
        info: What identifies the file, once it was read.
        width, height, taken_at, format, cut_rows: What decoding said of an image, once it was decoded.
        video: What a video's packets say, once it was scanned.
        outcome: Its parts with their features, their rows alone where those are staged, why it has none, or KNOWN.
        seconds: What workers spent on it, by stage.
        image, prepared: An image's pixels, and what the encoder takes of them, each until it is used.
        pixels: That it has of the budget.
        parts: Collects its features.
        encoding: Pieces that are to come out of the encoder.
        all_sent: Whether all its pieces have gone there.
    """

    entry: Entry
    info: FileInfo | None = None
    width: int | None = None
    height: int | None = None
    taken_at: str | None = None
    format: str | None = None
    cut_rows: int | None = None
    video: VideoInfo | None = None
    outcome: list[Part] | Staged | ItemError | Known | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    image: DecodedImage | None = None
    prepared: Prepared | None = None
    pixels: int = 0
    parts: Parts | None = None
    encoding: int = 0
    all_sent: bool = False

    @property
    def content(self) -> Content | None:
        """What names its features; of a video with several parts, those of the first."""
        return None if self.info is None else (self.info.sha256, 0)


@dataclass
class Piece:
    """What goes through the encoder by itself: an image, or one temporal slice of a clip."""

    item: Result
    prepared: Prepared
    clip: Clip | None = None
    outcome: Features | ItemError | None = None
