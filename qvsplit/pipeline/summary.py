"""What an extraction did, and what a caller may hear while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType


@dataclass(frozen=True)
class Preview:
    """What it would take to encode the items that are new. Copies and moves, not distinguished here, cost less.

    `tokens`, `bytes` and `seconds` are None where there is nothing to go by.
    """

    items: int
    bad: int  # of them: those without a sound header
    tokens: int | None
    bytes: int | None
    seconds: float | None
    seconds_by: str  # "earlier runs" or "arithmetic"


@dataclass
class Summary:
    """What a run did. Counts are of items; `seconds` and `stages` wall time, workers' stages summed over workers.

        summary = qvsplit.extract_files("photos")
        print(summary.encoded, summary.failed)

    found = unchanged + failed_before + to_read, and to_read = encoded + copied + moved + metadata_changed + failed +
    failed_again + disappeared + remaining. encoded = new + modified + re_encoded.
    """

    found: int = 0
    unchanged: int = 0
    failed_before: int = 0  # known to be bad, unchanged, not tried again
    to_read: int = 0  # items that had to be read (in a dry run: would have to be)
    encoded: int = 0
    new: int = 0
    modified: int = 0
    re_encoded: int = 0  # neither: their features had been lost, or they had failed
    copied: int = 0  # the same bytes as another item: nothing encoded, nothing stored twice
    moved: int = 0  # from a name that no longer exists: nothing encoded
    metadata_changed: int = 0  # read, and found to have the same bytes
    failed: int = 0  # that had not failed before
    failed_again: int = 0
    disappeared: int = 0  # between being listed and being read
    remaining: int = 0  # for another run: stopped by a limit or an interrupt
    deleted: int = 0  # marked by this run; a moved file's old name is not counted
    not_found: int = 0  # rows whose file was not found, left as they are
    excluded: int = 0  # rows whose file is there and is left out now, by a pattern or by default: they stay as they are
    left_out: dict[str, int] = field(default_factory=dict)  # files that nothing here reads, by the end of their names
    excluded_files: int = 0  # that were met and are excluded by a pattern
    excluded_folders: int = 0  # that were met and are excluded, with all that is in them
    repaired: int = 0  # damaged shards that were quarantined
    videos: int = 0  # of the encoded: those that are videos
    clips: int = 0  # rows of these: one a video, or one a part of it
    video_seconds: float = 0.0  # of these
    cut_off: int = 0  # of the encoded, copied and moved: images some of whose pixels are missing
    tokens: int = 0
    bytes: int = 0  # of shards written
    shards: int = 0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    encoder_bytes: int = 0  # of the encoder in the compute dtype
    weights_bytes_read: int = 0
    peak_memory_bytes: int = 0
    decoder_memory_bytes: int = 0  # the most that the decoders took, summed over them
    peak_gpu_memory_bytes: int = 0  # of the device that took the most
    patch_budget: int = 0  # patches in one forward pass
    store: str = ""
    model: str = ""
    interrupted: bool = False
    stopped: str = ""  # "limit" or "max-runtime" where that left items for another run
    preview: Preview | None = None  # in a dry run: what it would take

    @property
    def did_anything(self) -> bool:
        """Say whether there is something to report: the run changed something, or met something new."""
        done = self.encoded + self.copied + self.moved + self.deleted
        return bool(done or self.failed or self.remaining or self.repaired or self.interrupted or self.disappeared)

    def to_json(self) -> dict[str, Any]:
        """Give it as the commands print it in JSON."""
        return asdict(self)

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        """Add what stages took."""
        for stage, more in seconds.items():
            self.stages[stage] = self.stages.get(stage, 0.0) + more


@dataclass(frozen=True)
class Progress:
    """How far a run of `extract_files` is, as `on_progress` hears it after each item.

        qvsplit.extract_files("photos", on_progress=lambda now: print(f"{now.done}/{now.total} {now.path}"))

    Attributes:
        done: Items that were dealt with so far.
        total: Items that had to be read.
        path: The item that was dealt with last, below its folder.
        error: Why that item failed, if it failed and had not failed before.
    """

    done: int
    total: int
    path: str
    error: str | None = None


@dataclass
class ExtractCallbacks:
    """What a caller may want to hear while a run goes on. Called in the caller's thread.

        qvsplit.extract_files("photos", callbacks=qvsplit.ExtractCallbacks(on_note=print))

    Attributes:
        on_plan: Hears how many items have to be read.
        on_item: Hears the path of each item that was dealt with.
        on_failure: Hears path and reason of each item that failed and had not failed before, ahead of its `on_item`.
        on_note: Hears remarks, a line each.
        on_shard: Hears how many of how many shards have been read, where the store's catalogue does not know them.
        on_load: Hears each part of loading the encoder as it begins, and how many of how many bytes of its tensors have
            been read: `cluster`, `libraries`, `config and processor`, `tensors`, `laying out`; in the end `ready`.
        on_end: Hears once what the run did, however it ends: by returning, by an error, by an interrupt.
    """

    on_plan: Callable[[int], None] = lambda to_read: None
    on_item: Callable[[str], None] = lambda path: None
    on_failure: Callable[[str, str], None] = lambda path, reason: None
    on_note: Callable[[str], None] = lambda line: None
    on_shard: Callable[[int, int], None] = lambda done, total: None
    on_load: Callable[[str, int, int], None] = lambda part, done, total: None
    on_end: Callable[[Summary], None] = lambda summary: None


def with_progress(callbacks: ExtractCallbacks, on_progress: Callable[[Progress], None]) -> ExtractCallbacks:
    """Give `callbacks`, of which `on_progress` hears after each item as well."""
    total, done, error = 0, 0, None

    def on_plan(to_read: int) -> None:
        nonlocal total
        total = to_read
        callbacks.on_plan(to_read)

    def on_failure(path: str, reason: str) -> None:
        nonlocal error
        error = reason
        callbacks.on_failure(path, reason)

    def on_item(path: str) -> None:
        nonlocal done, error
        done, failed, error = done + 1, error, None
        callbacks.on_item(path)
        on_progress(Progress(done, total, path, failed))

    return replace(callbacks, on_plan=on_plan, on_failure=on_failure, on_item=on_item)


class Timer:
    """Adds the wall time of its block to `seconds[stage]`."""

    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self.seconds = seconds
        self.stage = stage

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + time.perf_counter() - self._began
