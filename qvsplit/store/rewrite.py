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
from qvsplit.store.features import Features
from qvsplit.store.lock import Lock
from qvsplit.store.row import Content, Key, Row
from qvsplit.store.schema import ShardSchema
from qvsplit.store.shard_reader import Shard
from qvsplit.store.storage import Storage
from qvsplit.store.store import Store
from qvsplit.store.store_writer import StoreWriter

Place = tuple[str, int]  # shard's name, index of a row


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
    old = [shard for shard in store.shards if shard.name in what.doomed]
    written = 0
    if old:
        lock.announce()
        written = _write(storage, store, what, old)
        if what.delete:
            storage.delete(*(shard.name for shard in old))
    after = _sizes(storage)
    dropped = sum(len(shard.rows) for shard in old) - written
    return Rewritten(len(before), len(after), sum(before), sum(after), max(0, dropped))


def _sizes(storage: Storage) -> list[int]:
    with disk_errors(storage.location):
        return [file.size for file in storage.list() if layout.shard_number(file.name) is not None]


def _write(storage: Storage, store: Store, what: Rewrite, old: Sequence[Shard]) -> int:
    """Give the number of rows written."""
    kept = [row for row in store.rows if row.key not in what.drop]
    provenance = {one.id: one for shard in old for one in shard.schema.provenance}
    schema = ShardSchema(old[0].config, old[0].schema.tensors, tuple(provenance.values()))
    writer = StoreWriter(storage, schema)
    try:
        for shard, index, row, has_features in _current_rows(store, kept, old):
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


def _current_rows(store: Store, kept: Sequence[Row], old: Sequence[Shard]) -> Iterator[tuple[Shard, int, Row, bool]]:
    """Give each row to write, in order: the shard and index at hand, the row, and whether its features are there.

    Features that current rows need are written with one of these rows: with the one that holds them, if it is current,
    else with the first that needs them, wherever that stands.
    """
    carriers = _carriers(store, kept, old)
    without_features = {_part(row) for row in kept} - {_part(row) for row in carriers.values()}
    for shard in old:
        for index, row in enumerate(shard.rows):
            carrier = carriers.get((shard.name, index))
            if carrier is not None:
                yield shard, index, carrier, True
            elif _part(row) in without_features and store.is_current(row):
                yield shard, index, replace(row, has_features=False), False


def _carriers(store: Store, kept: Sequence[Row], old: Sequence[Shard]) -> dict[Place, Row]:
    """Map places whose features are needed to the row that is to be written with them."""
    needed = rows_by_content(kept)
    carriers = {}
    for shard in old:
        for index, row in enumerate(shard.rows):
            if row.has_features and row.content is not None and store.is_home(row.content, shard, index):
                wanting = needed.get(row.content, [])
                own = next((one for one in wanting if one.key == row.key), None)
                if wanting:
                    carriers[shard.name, index] = own or wanting[0]
    return carriers


def _part(row: Row) -> tuple[str, str, int]:
    return row.root, row.path, row.part


def rows_by_content(rows: Collection[Row]) -> dict[Content, list[Row]]:
    """Map each content that `ok` rows show to those rows."""
    needed: dict[Content, list[Row]] = {}
    for row in rows:
        if row.status == "ok" and row.content is not None:
            needed.setdefault(row.content, []).append(row)
    return needed
