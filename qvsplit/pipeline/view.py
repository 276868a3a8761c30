"""What is known before a plan is made: what a call is about, what the store's catalogue says, what the source lists."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING

from qvsplit.errors import UsageError, some_of
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.pipeline.plan import Cures
from qvsplit.pipeline.summary import ExtractCallbacks
from qvsplit.runtime.atomic_files import disk_errors
from qvsplit.runtime.memory import machine_memory
from qvsplit.runtime.names import file_on_disk, is_within, name_on_disk
from qvsplit.sources.folders import IMAGE_SUFFIXES, SUFFIXES, LocalFolders
from qvsplit.sources.images import optional_readers
from qvsplit.sources.source import Folder, LeftOut, Listing, Source
from qvsplit.store import rebuild
from qvsplit.store.catalogue import FolderTally
from qvsplit.store.catalogue_file import catalogue_of, known_catalogue
from qvsplit.store.opening import store_of
from qvsplit.store.repair import RepairNotes, damage_marks, repair
from qvsplit.store.shards import placed_from, refuse_half_placed, shard_files
from qvsplit.store.storage import Storage
from qvsplit.store.store import Store

if TYPE_CHECKING:
    from qvsplit.store.lock import Lock


@dataclass(frozen=True)
class Call:
    """The arguments of one call."""

    paths: Sequence[str | PathLike[str]]
    storage: Storage
    options: ExtractOptions
    callbacks: ExtractCallbacks
    cures: Cures
    began: float  # by time.perf_counter()
    clock: float  # by time.time()
    seconds: dict[str, float]  # what was spent before there is a summary, by stage
    stack: ExitStack  # closes at the end what was opened


@dataclass(frozen=True)
class View:
    """What is known before a plan is made.

    Attributes:
        store: The store, as its catalogue has it.
        repaired: Damaged shards that were quarantined; None where that was not looked into, as nobody holds the lock.
        tallies: The folders in which nothing was left to do; none where every file is to be looked at.
        source: Where items come from.
        listings: What it lists.
    """

    store: Store
    repaired: int | None
    tallies: Mapping[Folder, FolderTally]
    source: Source
    listings: Sequence[Listing]


def current_cures(options: ExtractOptions) -> Cures:
    """Say what this run can read, and under which limits: failures are tried again where that has changed."""
    return Cures(
        optional_readers(videos=options.videos), options.item_timeout, machine_memory(), options.device or "",
        options.max_image_pixels,
    )  # fmt: skip


def look(call: Call, lock: Lock | None) -> View:
    """List, with what the store's catalogue knows; only shards that it does not know are opened."""
    began = time.perf_counter()
    with disk_errors(call.storage.location):
        files = shard_files(call.storage)
    catalogue = None
    if files and placed_from(call.storage) is None and not damage_marks(call.storage):
        catalogue = known_catalogue(call.storage, files)
    if catalogue is not None:
        store, repaired = _closed_at_the_end(call, Store(catalogue, call.storage)), 0 if lock is not None else None
    else:
        store, repaired = opened(call, lock)
    view = listed(call, store, repaired)
    if not sum(listing.number for listing in view.listings):
        _refuse_nothing(call, view)
    call.seconds["scan"] = time.perf_counter() - began
    return view


def opened(call: Call, lock: Lock | None) -> tuple[Store, int | None]:
    """Open the store: as it is on disk, repaired, where we hold the lock; else as anybody may read it."""
    if lock is None:
        return read_unlocked(call), None
    rebuild.finish(call.storage)
    model_named = call.options.model is not None
    notes = RepairNotes(call.callbacks.on_note, call.callbacks.on_shard)
    store, repaired = repair(call.storage, lock, notes, model_named=model_named)
    return _closed_at_the_end(call, store), repaired


def read_unlocked(call: Call) -> Store:
    """Read what can be read. What is damaged is left out: whoever holds the lock quarantines it."""
    if call.options.dry_run:
        refuse_half_placed(call.storage)
    with disk_errors(call.storage.location):
        files = shard_files(call.storage)
    if not files:
        return store_of([])
    leave_out = None if call.options.dry_run else lambda name, error: None
    catalogue = catalogue_of(call.storage, files, on_shard=call.callbacks.on_shard, on_damaged=leave_out)
    return _closed_at_the_end(call, Store(catalogue, call.storage))


def _closed_at_the_end(call: Call, store: Store) -> Store:
    call.stack.callback(store.close)
    return store


def listed(call: Call, store: Store, repaired: int | None) -> View:
    """List what there is; folders are known by their digest where nothing was left to do in them."""
    options = call.options
    source = source_of(
        call.paths, call.storage.location, store.roots, exclude=options.exclude, videos=options.videos,
        on_note=call.callbacks.on_note,
    )  # fmt: skip
    everything = options.checksum or options.rebuild
    tallies = {} if everything else store.catalogue.tallies
    # what failed before may be read now
    again = options.retry_failed or store.catalogue.cures != call.cures.to_json()
    known = {folder: one.digest for folder, one in tallies.items() if one.digest and not (again and one.failed)}
    return View(store, repaired, tallies, source, list(source.list(known)))


def source_of(
    paths: Sequence[str | PathLike[str]],
    location: str,
    roots: Iterable[str],
    *,
    exclude: Sequence[str],
    videos: bool,
    on_note: Callable[[str], None] = lambda line: None,
) -> LocalFolders:
    """Give `paths` as an extraction into the store at `location`, which has items below `roots`, walks them."""
    return LocalFolders(
        paths,
        out=os.path.realpath(location),
        roots=frozenset(map(name_on_disk, roots)),
        suffixes=_suffixes(videos=videos),
        exclude=exclude,
        on_note=on_note,
    )


def _suffixes(*, videos: bool) -> frozenset[str]:
    """Give the ends of names that a walk takes."""
    return SUFFIXES if videos else IMAGE_SUFFIXES


def _refuse_nothing(call: Call, view: View) -> None:
    """UsageError where no path holds an item: that is more often a mistake, or a disk that is not mounted."""
    for start in view.source.scope.empty:
        if number := rows_below(view.store, start):
            raise UsageError(no_items_any_more(start, number))
    suffixes = sorted(_suffixes(videos=call.options.videos))
    raise UsageError(
        f"no images or videos in {', '.join(fspath(path) for path in call.paths)} (looked for "
        f"{some_of(suffixes, 60)}{_left_out(view.source.scope.left_out)}); nothing was changed"
    )


def _left_out(left_out: LeftOut) -> str:
    """Say what there is instead, behind a semicolon; nothing where there is nothing."""
    counts = {**left_out.kinds, "excluded files": left_out.files, "excluded folders": left_out.folders}
    found = ", ".join(f"{number:,} {what}" for what, number in counts.items() if number)
    return f"; there are {found}" if found else ""


def rows_below(store: Store, start: str) -> int:
    """Count the rows of a folder, as the file system has it, and of those below it, that are not deleted."""
    counts = store.catalogue.counts_by_folder().items()
    return sum(number for folder, number in counts if is_within(file_on_disk(*folder).rstrip("/"), start))


def no_items_any_more(start: str, number: int) -> str:
    return (
        f"{start} holds no images any more; its {number:,} rows are left as they are, in case it is not mounted (if "
        "they were deleted, `qvsplit purge` takes them out)"
    )
