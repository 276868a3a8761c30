"""Rebuild: a store made again, under another extraction config if need be, beside the old one, and put in its place.

The new one grows as a store of its own in `.qvsplit/rebuild/`, so that a killed rebuild is taken up like any other run.
From the moment its marker is on disk it is the store: the old shards are deleted, the new ones move up, and whoever
comes in between is told to let that be finished first (`shards.refuse_half_placed`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from qvsplit.runtime.names import file_on_disk, is_within, name_on_disk
from qvsplit.store import layout
from qvsplit.store.row import Row
from qvsplit.store.shards import next_number, placed_from, shards_in
from qvsplit.store.storage import Storage


def begin(storage: Storage) -> Storage:
    """Prepare `.qvsplit/rebuild/`, or take up what a killed rebuild left there; gives its storage."""
    new = storage.below(layout.REBUILD)
    new.delete_below(layout.STAGING)
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
    return storage.delete_below(layout.REBUILD)


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
    first = min(layout.shard_number(name) or 0 for name in shards_in(storage.below(layout.REBUILD)))
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
    for name in shards_in(storage.below(layout.REBUILD)):
        storage.move(f"{layout.REBUILD}/{name}", name)
    # all that the marker stands for is on disk: it goes last
    storage.delete_below(layout.REBUILD, last=layout.REBUILD_COMPLETE.rpartition("/")[2])
