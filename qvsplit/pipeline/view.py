"""What is known before a plan is made: what a call is about, what the store's caches say, what the source lists.

The shards are read only if the folder index of the last run cannot be trusted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING

from qvsplit.errors import ShardDamaged, UsageError, some_of
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.pipeline.plan import Cures
from qvsplit.pipeline.summary import ExtractCallbacks
from qvsplit.runtime.atomic_files import disk_errors
from qvsplit.runtime.memory import machine_memory
from qvsplit.runtime.names import file_on_disk, is_within, name_on_disk
from qvsplit.sources.folders import SUFFIXES, LocalFolders
from qvsplit.sources.images import optional_readers
from qvsplit.sources.source import Folder, Listing, Source
from qvsplit.store import rebuild
from qvsplit.store.folder_index import FolderIndex, FolderTally, read_index
from qvsplit.store.repair import damage_marks, repair
from qvsplit.store.shard_reader import Shard
from qvsplit.store.shards import placed_from, refuse_half_placed, shards_in
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


@dataclass(frozen=True)
class View:
    """What is known before a plan is made.

    Attributes:
        index: The folder index of the last run, if it can be trusted.
        store: The store; None as long as the index does for it.
        repaired: Damaged shards that were quarantined; None where that was not looked into.
        source: Where items come from.
        listings: What it lists.
    """

    index: FolderIndex | None
    store: Store | None
    repaired: int | None
    source: Source
    listings: Sequence[Listing]

    @property
    def tallies(self) -> Mapping[Folder, FolderTally]:
        return self.index.folders if self.index else {}


def current_cures(options: ExtractOptions) -> Cures:
    """Say what this run can read, and under which limits: failures are tried again where that has changed."""
    return Cures(optional_readers(), options.item_timeout, machine_memory(), options.device or "")


def look(call: Call, lock: Lock | None) -> View:
    """List, with what the last run's index knows; without it, the store is read first."""
    began = time.perf_counter()
    with disk_errors(call.storage.location):
        shards = shards_in(call.storage)
    index = None
    everything = call.options.checksum or call.options.rebuild
    if shards and not everything and placed_from(call.storage) is None and not damage_marks(call.storage):
        index = read_index(call.storage, shards)
        if index is not None and index.cures != call.cures.to_json():
            index = None  # what failed before may be read now
    store, repaired = (None, None) if index is not None else opened(call, lock)
    view = listed(call, index, store, repaired)
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
    return repair(call.storage, lock, call.callbacks.on_note, model_named=model_named)


def read_unlocked(call: Call) -> Store:
    """Read what can be read. What is damaged is left out: whoever holds the lock quarantines it."""
    if call.options.dry_run:
        refuse_half_placed(call.storage)
    shards = []
    with disk_errors(call.storage.location):
        names = shards_in(call.storage)
    for name in names:
        try:
            shards.append(Shard(call.storage, name))
        except ShardDamaged:
            if call.options.dry_run:
                raise
    return Store(shards)


def listed(call: Call, index: FolderIndex | None, store: Store | None, repaired: int | None) -> View:
    """List what there is; folders are known by their digest where nothing was left to do in them."""
    if index is not None:
        roots = index.roots_on_disk
    else:
        assert store is not None  # read, as there is no index
        roots = frozenset(map(name_on_disk, store.roots))
    source = LocalFolders(
        call.paths, out=os.path.realpath(call.storage.location), roots=roots, on_note=call.callbacks.on_note
    )
    again = call.options.retry_failed
    known = {
        folder: tally.digest
        for folder, tally in (index.folders if index else {}).items()
        if tally.digest and not (again and tally.failed)
    }
    return View(index, store, repaired, source, list(source.list(known)))


def _refuse_nothing(call: Call, view: View) -> None:
    """UsageError where no path holds an item: that is more often a mistake, or a disk that is not mounted."""
    if view.index is not None:
        counts = {file_on_disk(*folder): one.ok + one.failed for folder, one in view.index.folders.items()}
    else:
        assert view.store is not None
        counts = {file_on_disk(row.root, row.path): 1 for row in view.store.rows if row.status != "deleted"}
    for start in view.source.scope.empty:
        number = sum(count for name, count in counts.items() if is_within(name.rstrip("/"), start))
        if number:
            raise UsageError(no_items_any_more(start, number))
    raise UsageError(
        f"no images in {', '.join(fspath(path) for path in call.paths)} (looked for {some_of(SUFFIXES, 40)}); nothing "
        "was changed"
    )


def no_items_any_more(start: str, number: int) -> str:
    return (
        f"{start} holds no images any more; its {number:,} rows are left as they are, in case it is not mounted (if "
        "they were deleted, `qvsplit purge` takes them out)"
    )
