"""Write what is current in some shards into new ones, behind all others, and only then delete the old.

What holds at every moment, also after a death: new shards come after all others and repeat current rows as they are;
only when they are on disk for good are the old ones deleted. So a reader finds the same items before, between and
after. Rows keep their order and their generation; features are copied bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from qvsplit.errors import ShardDamaged
from qvsplit.runtime.atomic_files import disk_errors
from qvsplit.store import layout
from qvsplit.store.catalogue import CataloguedShard
from qvsplit.store.features import Features
from qvsplit.store.lock import Lock
from qvsplit.store.row import Key, Row
from qvsplit.store.schema import ShardSchema
from qvsplit.store.shard_reader import Shard
from qvsplit.store.storage import Storage
from qvsplit.store.store import Store
from qvsplit.store.store_writer import StoreWriter


@dataclass(frozen=True)
class Rewritten:
    """What a rewrite did. Sizes in bytes on disk."""

    shards_before: int
    shards_after: int
    bytes_before: int
    bytes_after: int
    rows_dropped: int


@dataclass(frozen=True)
class Rewrite:
    """What is to be written anew.

    Attributes:
        doomed: Names of the shards whose current rows go into new ones.
        drop: Items that do not.
        on_lost: Called with a row whose features cannot be read, which is then written without; where it is None
            that is an error.
        delete: Whether the doomed are deleted in the end.
    """

    doomed: frozenset[str]
    drop: frozenset[Key] = frozenset()
    on_lost: Callable[[Row], None] | None = None
    delete: bool = True


def rewrite(storage: Storage, store: Store, what: Rewrite, lock: Lock) -> Rewritten:
    """Do it, under the lock.

    Raises:
        ShardDamaged: Features cannot be read, and there is no `on_lost`.
        DiskError: The disk is full, or cannot be written; the old shards are kept.
    """
    before = _sizes(storage)
    old = [entry for entry in store.catalogue.shards if entry.name in what.doomed]
    written = 0
    if old:
        lock.announce()
        written = _write(storage, store, what, old)
        if what.delete:
            storage.delete(*(entry.name for entry in old))
    after = _sizes(storage)
    dropped = sum(entry.rows for entry in old) - written
    return Rewritten(len(before), len(after), sum(before), sum(after), max(0, dropped))


def _sizes(storage: Storage) -> list[int]:
    with disk_errors(storage.location):
        return [file.size for file in storage.list() if layout.shard_number(file.name) is not None]


def _write(storage: Storage, store: Store, what: Rewrite, old: Sequence[CataloguedShard]) -> int:
    """Give the number of rows written."""
    provenance = {one.id: one for entry in old for one in entry.schema.provenance}
    schema = ShardSchema(old[0].schema.config, old[0].schema.tensors, tuple(provenance.values()))
    writer = StoreWriter(storage, schema)
    try:
        for shard, index, row, has_features in _current_rows(storage, store, what, old):
            writer.append(row, _features(shard, index, what.on_lost) if has_features else None)
        writer.end_shard()
    except BaseException:
        writer.abandon()
        raise
    return writer.written.rows


def _features(shard: Shard, index: int, on_lost: Callable[[Row], None] | None) -> Features | None:
    try:
        return shard.features(index)
    except ShardDamaged:
        if on_lost is None:
            raise
        on_lost(shard.rows[index])
        return None


def _current_rows(
    storage: Storage, store: Store, what: Rewrite, old: Sequence[CataloguedShard]
) -> Iterator[tuple[Shard, int, Row, bool]]:
    """Give each row to write, in order: the shard and index at hand, the row, and whether its features are there.

    Features that current rows need are written with one of these rows (see `_carrier`), and all others without.
    """
    numbers = {entry.number for entry in old}
    for entry in old:
        # not the store's own, which are kept open: this one's rows are done with behind it
        shard = Shard(storage, entry.name, keeps_features=True)
        current, homes = store.catalogue.current_places(entry.number), store.catalogue.homes(entry.number)
        for index, row in enumerate(shard.rows):
            carrier = _carrier(store, what.drop, row) if index in homes else None
            if carrier is not None:
                yield shard, index, carrier, True
            elif index in current and row.key not in what.drop and not _is_carrier(store, what.drop, row, numbers):
                yield shard, index, replace(row, has_features=False), False


def _carrier(store: Store, drop: Collection[Key], home: Row) -> Row | None:
    """Give the current row that is to be written with the features that `home` holds; None if nobody needs them.

    It is that row itself, if it is current, else the first that needs them, wherever that stands.
    """
    if home.content is None:
        return None
    wanting = [row for row in store.catalogue.rows_showing(home.content) if row.key not in drop]
    own = (row for row in wanting if row.key == home.key)
    return next(own, wanting[0] if wanting else None)


def _is_carrier(store: Store, drop: Collection[Key], row: Row, old: Collection[int]) -> bool:
    """Say whether a current row that holds no features of use is written with those that another row holds."""
    place = store.catalogue.home(row.content)
    if row.status != "ok" or place is None or place[0] not in old:
        return False
    carrier = _carrier(store, drop, store.shard(place[0]).row(place[1]))
    return carrier is not None and carrier.key == row.key
