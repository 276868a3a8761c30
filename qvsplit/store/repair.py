"""Repair: damaged shards are quarantined, what is sound in them is written anew, and the rest is encoded again.

Damaged is what does not open, and what `verify` has marked. Nothing is deleted: a quarantined shard keeps its bytes. A
shard that a newer version wrote is not damaged, and is left where it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from qvsplit.errors import DiskError, ShardDamaged
from qvsplit.runtime.atomic_files import disk_errors
from qvsplit.store import layout
from qvsplit.store.lock import Lock
from qvsplit.store.rewrite import Rewrite, rewrite
from qvsplit.store.shard_reader import Shard, read_checksum
from qvsplit.store.shards import shards_in
from qvsplit.store.storage import Storage
from qvsplit.store.store import Store, read_store


@dataclass(frozen=True)
class Mark:
    """What `verify` found in a shard whose footer has this checksum."""

    checksum: str
    what: str


def repair(storage: Storage, lock: Lock, on_note: Callable[[str], None], *, model_named: bool) -> tuple[Store, int]:
    """Quarantine damaged shards; gives the store as it is then, and how many there were.

    Items that cannot be saved are left without features, so that the next `extract` encodes them again.

    Raises:
        ShardDamaged: No shard is sound and no model is named: nothing says how the store is to be made again.
        ConfigError: A newer version wrote a shard.
    """
    with disk_errors(storage.location):
        names = shards_in(storage)
    marked = damage_marks(storage)
    shards, damaged = _opened(storage, names, marked)
    sound = {shard.name for shard in shards}
    unsound = [name for name in names if name not in sound]
    if unsound and not shards and not model_named:
        where, what = storage.where(unsound[-1]), damaged[unsound[-1]]
        raise ShardDamaged(
            f"{where} is damaged ({what}), and no other shard says what {storage.location} was made with; name its "
            "model with --model to have it made again",
            where,
            what,
        )
    store = Store(shards)
    if damaged:
        lock.announce()
        openable = frozenset(shard.name for shard in shards if shard.name in damaged)
        if openable:
            rewrite(storage, store, Rewrite(openable, on_lost=lambda _: None, delete=False), lock)
        for name, what in damaged.items():
            to = _quarantine(storage, name)
            saved = ", but for what is sound in it" if name in openable else ""
            on_note(f"{name} is damaged ({what}): quarantined as {to}; its items are encoded again{saved}")
        store = read_store(storage)
    if marked:
        storage.delete(*map(_mark_of, marked))
    clear_marks(storage)
    return store, len(damaged)


def _opened(storage: Storage, names: list[str], marked: Mapping[str, Mark]) -> tuple[list[Shard], dict[str, str]]:
    """Give the shards that open, and what is wrong with those that do not, or are marked."""
    shards, damaged = [], {}
    for name in names:
        try:
            shards.append(Shard(storage, name))
        except ShardDamaged as error:
            damaged[name] = error.what
            continue
        if name in marked and marked[name].checksum == read_checksum(storage, name).hex():
            damaged[name] = marked[name].what
    return shards, damaged


def mark_damage(storage: Storage, name: str, what: str) -> bool:
    """Have the next `extract` quarantine the shard; False where that cannot be written down."""
    try:
        checksum = read_checksum(storage, name).hex()
    except (OSError, ValueError):
        return True  # it shows by itself
    try:
        with storage.put_whole(_mark_of(name)) as stream:
            stream.write(json.dumps({"checksum": checksum, "what": what}).encode())
    except DiskError:
        return False
    return True


def damage_marks(storage: Storage) -> dict[str, Mark]:
    """Give the marks of shards that exist, by the shard's name."""
    marks = {}
    files = {file.name for file in storage.list(layout.DAMAGE)}
    if not files:
        return {}
    for name in shards_in(storage):
        if f"{name}.json" in files:
            with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                with storage.open(_mark_of(name)) as stream:
                    content = json.loads(stream.read())
                marks[name] = Mark(str(content["checksum"]), str(content["what"]))
    return marks


def clear_marks(storage: Storage) -> None:
    """Delete the marks of shards that no longer exist."""
    shards = {f"{name}.json" for name in shards_in(storage)}
    stale = [f"{layout.DAMAGE}/{file.name}" for file in storage.list(layout.DAMAGE) if file.name not in shards]
    if stale:
        storage.delete(*stale)


def _mark_of(name: str) -> str:
    return f"{layout.DAMAGE}/{name}.json"


def _quarantine(storage: Storage, name: str) -> str:
    """Move the shard into quarantine, under a name of its own there; gives that."""
    taken = {file.name for file in storage.list(layout.QUARANTINE)}
    number, free = 0, name
    while free in taken:
        number += 1
        free = f"{name}.{number}"
    storage.move(name, f"{layout.QUARANTINE}/{free}")
    return f"{layout.QUARANTINE}/{free}"
