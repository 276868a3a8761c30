"""Write what is current in some shards into new ones, behind all others, and only then delete the old.

What holds at every moment, also after a death: new shards come after all others and repeat current rows as they are;
only when they are on disk for good are the old ones deleted. So a reader finds the same items before, between and
after. Rows keep their order and their generation, the parts of an item stay together in one shard, and features are
copied bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from qvsplit.errors import ShardDamaged
from qvsplit.runtime.atomic_files import disk_errors
from qvsplit.store import layout
from qvsplit.store.catalogue import CataloguedShard, Place
from qvsplit.store.catalogue_file import OnShard, no_progress
from qvsplit.store.features import Features
from qvsplit.store.lock import Lock
from qvsplit.store.row import Key, Row
from qvsplit.store.schema import ShardSchema
from qvsplit.store.shard_reader import Shard
from qvsplit.store.storage import Storage
from qvsplit.store.store import Store
from qvsplit.store.store_writer import Part, StoreWriter


@dataclass(frozen=True)
class Rewritten:
    """What a rewrite did. Sizes in bytes on disk."""

    shards_before: int
    shards_after: int
    bytes_before: int
    bytes_after: int
    rows_dropped: int


@dataclass(frozen=True)
class Foretold:
    """What a rewrite would do. Sizes in bytes on disk, as they are before it.

    Attributes:
        shards: All of the store.
        bytes: Their size.
        shards_rewritten: Those whose rows would go into new ones.
        bytes_rewritten: Their size: so much free space a rewrite needs at most.
        rows_kept: Rows that would be written.
        rows_dropped: Rows that would not.
        features_dropped: Images, and parts of videos, whose features would go.
    """

    shards: int
    bytes: int
    shards_rewritten: int
    bytes_rewritten: int
    rows_kept: int
    rows_dropped: int
    features_dropped: int


@dataclass(frozen=True)
class Rewrite:
    """What is to be written anew.

    Attributes:
        doomed: Names of the shards whose current rows go into new ones.
        drop: Items that do not.
        on_lost: Called with a row whose features cannot be read, which is then written without; where it is None
            that is an error.
        delete: Whether the doomed are deleted in the end.
        on_shard: Called with how many of how many shards have been gone through.
    """

    doomed: frozenset[str]
    drop: frozenset[Key] = frozenset()
    on_lost: Callable[[Row], None] | None = None
    delete: bool = True
    on_shard: OnShard = no_progress


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


def foretell(storage: Storage, store: Store, what: Rewrite) -> Foretold:
    """Say what `rewrite` would do, without a lock and without reading features."""
    sizes = _sizes(storage)
    old = [entry for entry in store.catalogue.shards if entry.name in what.doomed]
    items = _WithoutFeatures(storage, store, what, old)
    kept = sum(1 for parts in items for _ in parts)
    features = sum(row.has_features for entry in old for row in Shard(storage, entry.name).rows)
    return Foretold(
        shards=len(sizes),
        bytes=sum(sizes),
        shards_rewritten=len(old),
        bytes_rewritten=sum(entry.size for entry in old),
        rows_kept=kept,
        rows_dropped=max(0, sum(entry.rows for entry in old) - kept),
        features_dropped=features - items.with_features,
    )


def _sizes(storage: Storage) -> list[int]:
    with disk_errors(storage.location):
        return [file.size for file in storage.list() if layout.shard_number(file.name) is not None]


def _write(storage: Storage, store: Store, what: Rewrite, old: Sequence[CataloguedShard]) -> int:
    """Give the number of rows written."""
    provenance = {one.id: one for entry in old for one in entry.schema.provenance}
    assert store.config is not None
    writer = StoreWriter(storage, ShardSchema(store.config, old[0].schema.tensors, tuple(provenance.values())))
    try:
        for parts in _Items(storage, store, what, old):
            writer.append_item(parts, as_found=True)
        writer.end_shard()
        what.on_shard(len(old), len(old))
    except BaseException:
        writer.abandon()
        raise
    return writer.written.rows


class _Items:
    """The items to write, in order, each as its rows with the features that are to go with them.

    Features that current rows need are written with one of these rows (see `_carrier`), and all others without.
    """

    def __init__(self, storage: Storage, store: Store, what: Rewrite, old: Sequence[CataloguedShard]) -> None:
        self._storage = storage
        self._store = store
        self._what = what
        self._old = old
        self._numbers = {entry.number for entry in old}
        self._written: set[Key] = set()  # items of several parts

    def __iter__(self) -> Iterator[Iterable[Part]]:
        """Go through the old shards row by row; an item's parts come together, where the first of them is."""
        for number, entry in enumerate(self._old):
            self._what.on_shard(number, len(self._old))
            # not the store's own, which are kept open: this one's rows are done with behind it
            shard = Shard(self._storage, entry.name, keeps_features=True)
            current = self._store.catalogue.current_places(entry.number)
            homes = self._store.catalogue.homes(entry.number)
            for index, row in enumerate(shard.rows):
                carrier = self._carrier(row) if index in homes else None
                if carrier is not None and not carrier.is_part:
                    yield [(carrier, self._features(shard, index))]
                elif carrier is not None:
                    yield from self._parts(carrier.key, shard)
                elif index in current and row.key not in self._what.drop and not self._is_carried(row):
                    yield from self._parts(row.key, shard) if row.is_part else [[(row, None)]]

    def _parts(self, key: Key, at_hand: Shard) -> Iterator[Iterable[Part]]:
        """Give an item of several parts, once."""
        if key not in self._written:
            self._written.add(key)
            yield self._each(self._store.catalogue.rows_of(*key), at_hand)

    def _each(self, rows: Sequence[Row], at_hand: Shard) -> Iterator[Part]:
        for row in rows:
            place = self._home(row) if self._is_carried(row) else None
            if place is None:
                yield row, None
                continue
            # one after the other, row groups are read once
            shard = at_hand if at_hand.name == self._name_of(place[0]) else self._store.shard(place[0])
            yield row, self._features(shard, place[1])

    def _features(self, shard: Shard, index: int) -> Features | None:
        try:
            return shard.features(index)
        except ShardDamaged:
            if self._what.on_lost is None:
                raise
            self._what.on_lost(shard.rows[index])
            return None

    def _carrier(self, home: Row) -> Row | None:
        """Give the current row that is to be written with the features that `home` holds; None if nobody needs them.

        It is that row itself, if it is current, else the first that needs them, wherever that stands.
        """
        if home.content is None:
            return None
        shown = self._store.catalogue.rows_showing(home.content)
        wanting = [row for row in shown if row.key not in self._what.drop]
        own = (row for row in wanting if row.key == home.key)
        return next(own, wanting[0] if wanting else None)

    def _is_carried(self, row: Row) -> bool:
        """Say whether a current row is written with features that a row of the old shards, this or another, holds."""
        place = self._home(row)
        if place is None:
            return False
        carrier = self._carrier(self._store.shard(place[0]).row(place[1]))
        return carrier is not None and carrier.key == row.key

    def _home(self, row: Row) -> Place | None:
        """Give where a current row's features are, if that is in one of the old shards."""
        place = self._store.catalogue.home(row.content) if row.status == "ok" else None
        return place if place is not None and place[0] in self._numbers else None

    def _name_of(self, number: int) -> str:
        return next(entry.name for entry in self._old if entry.number == number)


class _WithoutFeatures(_Items):
    """The items to write, whose features are counted and not read."""

    with_features = 0

    def _features(self, shard: Shard, index: int) -> Features | None:
        self.with_features += 1
        return None
