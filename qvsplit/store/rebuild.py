"""Rebuild: a store made again, under another extraction config if need be, beside the old one, and put in its place.

The new one grows as a store of its own in `.qvsplit/rebuild/`, so that a killed rebuild is taken up like any other run.
From the moment its marker is on disk it is the store: the old shards are deleted, the new ones move up, and whoever
comes in between is told to let that be finished first (`shards.refuse_half_placed`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from qvsplit.runtime.atomic_files import disk_errors, sync_folder
from qvsplit.runtime.names import file_on_disk, is_within, name_on_disk
from qvsplit.store import layout
from qvsplit.store.row import Row
from qvsplit.store.shards import next_number, placed_from, shards_in
from qvsplit.store.storage import LocalStorage, Storage


def rebuild_storage(storage: Storage) -> Storage:
    """Give the storage in which the new store grows."""
    return LocalStorage(Path(storage.where(layout.REBUILD)))


def begin(storage: Storage) -> Storage:
    """Prepare `.qvsplit/rebuild/`, or take up what a killed rebuild left there; gives its storage."""
    new = rebuild_storage(storage)
    folder = Path(new.location)
    with disk_errors(storage.location):
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)  # a power loss must not take it away once old shards are deleted
    new.delete(*(f"{layout.STAGING}/{file.name}" for file in new.list(layout.STAGING)))
    _number_above(storage, new)
    return new


def _number_above(storage: Storage, new: Storage) -> None:
    """Number the new shards above the store's own: an ordinary run in between may have used their numbers."""
    found = shards_in(new)
    numbers = [layout.shard_number(name) or 0 for name in found]
    shift = next_number(storage) - min(numbers, default=1 << 60)
    if shift > 0:
        for number, name in sorted(zip(numbers, found, strict=True), reverse=True):  # their order holds at any moment
            new.move(name, layout.shard_name(number + shift))


def discard(storage: Storage) -> bool:
    """Give up a new store that is not whole; says whether there was one. Only for whoever holds the lock."""
    folder = Path(storage.where(layout.REBUILD))
    if not folder.exists():
        return False
    with disk_errors(storage.location):
        shutil.rmtree(folder)
        sync_folder(folder.parent)
    return True


def roots_left_out(rows: Sequence[Row], starts: Sequence[str]) -> list[str]:
    """List roots with items that lie below none of the paths given, as the file system has them."""
    return sorted(
        {
            name_on_disk(row.root)
            for row in rows
            if row.status != "deleted" and not any(is_within(file_on_disk(row.root, row.path), one) for one in starts)
        }
    )


def put_in_place(storage: Storage) -> None:
    """Declare the new store whole: from here on it is the store."""
    first = min(layout.shard_number(name) or 0 for name in shards_in(rebuild_storage(storage)))
    with storage.put_whole(layout.REBUILD_COMPLETE) as stream:
        stream.write(json.dumps({"first": first}).encode())
    finish(storage)


def finish(storage: Storage) -> None:
    """Put a whole new store in place, where that was begun; else nothing. May die anywhere, and be called again."""
    first = placed_from(storage)
    if first is None:
        return
    old = [name for name in shards_in(storage) if (layout.shard_number(name) or 0) < first]
    if old:
        storage.delete(*old)
    for name in shards_in(rebuild_storage(storage)):
        storage.move(f"{layout.REBUILD}/{name}", name)
    folder = Path(storage.where(layout.REBUILD))
    marker = Path(storage.where(layout.REBUILD_COMPLETE))
    with disk_errors(storage.location):  # all that the marker stands for is on disk: it goes last
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != marker:
                path.unlink()
        marker.unlink()
        os.rmdir(folder)
        sync_folder(folder.parent)
