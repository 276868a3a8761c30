"""Repair: damaged shards are quarantined, what is sound in them is written anew, and the rest is encoded again.

Damaged is what does not open, and what `verify` has marked. Nothing is deleted: a quarantined shard keeps its bytes. A
shard that a newer version wrote is not damaged, and is left where it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from qvsplit.errors import DiskError, ShardDamaged
from qvsplit.runtime.atomic_files import disk_errors
from qvsplit.store import layout
from qvsplit.store.catalogue_file import OnShard, catalogue_of, no_progress
from qvsplit.store.lock import Lock
from qvsplit.store.opening import store_of
from qvsplit.store.rewrite import Rewrite, rewrite
from qvsplit.store.shard_reader import sound_checksum
from qvsplit.store.shards import shard_files, shards_in
from qvsplit.store.storage import Storage
from qvsplit.store.store import Store


@dataclass(frozen=True)
class Mark:
    """What `verify` found in a shard whose footer has this checksum."""

    checksum: str
    what: str


@dataclass(frozen=True)
class RepairNotes:
    """Who hears of a repair: remarks, a line each, and how many of how many shards have been read."""

    on_note: Callable[[str], None] = lambda line: None
    on_shard: OnShard = no_progress


def repair(storage: Storage, lock: Lock, notes: RepairNotes, *, model_named: bool) -> tuple[Store, int]:
    """Quarantine damaged shards; gives the store as it is then, and how many there were.

    Only shards that the catalogue does not know are opened. Items that cannot be saved are left without features, so
    that the next `extract` encodes them again.

    Raises:
        ShardDamaged: No shard is sound and no model is named: nothing says how the store is to be made again.
        ConfigError: A newer version wrote a shard.
    """
    marked = damage_marks(storage)
    damaged = {}
    for name, mark in marked.items():
        checksum = sound_checksum(storage, name)
        if checksum is not None and mark.checksum == checksum.hex():
            damaged[name] = mark.what
    unusable: dict[str, ShardDamaged] = {}
    store = _opened(storage, unusable, notes.on_shard)
    openable = frozenset(damaged.keys() - unusable.keys())
    damaged |= {name: error.what for name, error in unusable.items()}
    if unusable and not store.catalogue.shards and not model_named:
        name, error = sorted(unusable.items())[-1]
        where = storage.where(name)
        raise ShardDamaged(
            f"{where} is damaged ({error.what}), and no other shard says what {storage.location} was made with; name "
            "its `model` to have it made again",
            where,
            error.what,
        )
    if damaged:
        lock.announce()
        if openable:
            rewrite(storage, store, Rewrite(openable, on_lost=lambda _: None, delete=False), lock)
        for name, what in sorted(damaged.items()):
            to = _quarantine(storage, name)
            saved = ", but for what is sound in it" if name in openable else ""
            notes.on_note(f"{name} is damaged ({what}): quarantined as {to}; its items are encoded again{saved}")
        store = _opened(storage, {}, notes.on_shard)
    if marked:
        storage.delete(*map(_mark_of, marked))
    clear_marks(storage)
    return store, len(damaged)


def _opened(storage: Storage, unusable: dict[str, ShardDamaged], on_shard: OnShard) -> Store:
    """Open the store without the shards that cannot be used, which are put into `unusable`."""
    with disk_errors(storage.location):
        files = shard_files(storage)
    if not files:
        return store_of([])

    def leave_out(name: str, error: ShardDamaged) -> None:
        unusable[name] = error

    return Store(catalogue_of(storage, files, on_shard=on_shard, on_damaged=leave_out), storage)


def mark_damage(storage: Storage, name: str, what: str) -> bool:
    """Have the next `extract` quarantine the shard; False where that cannot be written down."""
    checksum = sound_checksum(storage, name)
    if checksum is None:
        return True  # it shows by itself
    try:
        with storage.put_whole(_mark_of(name)) as stream:
            stream.write(json.dumps({"checksum": checksum.hex(), "what": what}).encode())
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
