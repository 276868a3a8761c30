"""compact and purge: shards merged, rid of what is superseded, or of items that are to go for good."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from qvsplit.errors import UsageError
from qvsplit.runtime.names import file_on_disk
from qvsplit.store import finding, layout, rebuild
from qvsplit.store.catalogue import CataloguedShard
from qvsplit.store.catalogue_file import OnShard, catalogue_of, no_progress
from qvsplit.store.lock import Lock
from qvsplit.store.opening import open_store
from qvsplit.store.repair import clear_marks
from qvsplit.store.rewrite import Foretold, Rewrite, Rewritten, foretell, rewrite
from qvsplit.store.row import Content, Key, Row
from qvsplit.store.shard_reader import Shard
from qvsplit.store.shards import placed_from, shard_files, shards_in
from qvsplit.store.storage import LocalStorage, Storage
from qvsplit.store.store import Store
from qvsplit.store.store_writer import SHARD_BYTES
from qvsplit.store.walked import forget_walked

SMALL_BYTES = SHARD_BYTES // 2
WORTHWHILE = 0.2  # of a shard's rows or features that nobody needs any more


@dataclass(frozen=True)
class Purged(Rewritten):
    """What `purge` did.

    Attributes:
        purged: Items.
        shared: Of these: items whose features stay, as another item has the same bytes.
        still_there: Of these: items whose file still exists.
        removed_quarantined: Quarantined shards that were deleted, as they may have held them.
        removed_rebuild: Whether an unfinished rebuild was deleted, as it may have held them.
    """

    purged: int = 0
    shared: int = 0
    still_there: int = 0
    removed_quarantined: int = 0
    removed_rebuild: bool = False


@contextmanager
def opened_for_writing(
    place: str | os.PathLike[str], *, wait: bool = False, on_note: Callable[[str], None] = lambda line: None
) -> Iterator[tuple[Storage, Lock]]:
    """Lock the store in the folder `place`; a rebuilt store that is being put in place is finished first.

    Raises:
        UsageError: There is no store.
        StoreInUse: Another process is writing it.
    """
    storage = _storage_at(Path(place))
    with storage.lock(wait=wait, on_note=on_note) as lock:
        rebuild.finish(storage)
        yield storage, lock


@contextmanager
def opened_for_reading(place: str | os.PathLike[str]) -> Iterator[tuple[Storage, Store]]:
    """Open the store in the folder `place` as any reader does, without its lock.

    Raises:
        UsageError: There is no store.
    """
    storage = _storage_at(Path(place))
    with open_store(place) as store:
        yield storage, store


def _storage_at(folder: Path) -> LocalStorage:
    if folder.is_file():
        raise UsageError(f"{folder} is a file; give the store's folder")
    storage = LocalStorage(folder)
    if not folder.is_dir() or (not shards_in(storage) and placed_from(storage) is None):
        raise UsageError(f"no store at {folder}; give a folder of shards")
    return storage


def compact(storage: Storage, lock: Lock, *, on_shard: OnShard = no_progress) -> Rewritten:
    """Merge small shards, and drop rows and features that nothing current needs. Nothing is encoded again.

    `on_shard` hears how many of how many shards have been rewritten.
    """
    store = _opened(storage)
    done = rewrite(storage, store, Rewrite(_worthwhile(storage, store), on_shard=on_shard), lock)
    _opened(storage)
    return done


def foretell_compact(storage: Storage, store: Store) -> Foretold:
    """Say what `compact` would do to the store as it is read here. Takes no lock, and changes nothing."""
    return foretell(storage, store, Rewrite(_worthwhile(storage, store)))


def _worthwhile(storage: Storage, store: Store) -> frozenset[str]:
    """Name the shards that are to be merged, or hold much that nobody needs."""
    entries = store.catalogue.shards
    small = frozenset(entry.name for entry in entries if entry.size < SMALL_BYTES)
    doomed = set(small if len(small) > 1 else ())
    doomed |= {entry.name for entry in entries if _dead_rows(storage, store, entry) >= max(1, WORTHWHILE * entry.rows)}
    return frozenset(doomed)


def _opened(storage: Storage) -> Store:
    """Open the store, and bring its catalogue up to date."""
    return Store(catalogue_of(storage, shard_files(storage)), storage)


def _dead_rows(storage: Storage, store: Store, entry: CataloguedShard) -> int:
    """Count the rows of a shard that are of no use, and neither are the features they hold."""
    current, homes = store.catalogue.current_places(entry.number), store.catalogue.homes(entry.number)
    superseded = homes - current.keys()
    rows = Shard(storage, entry.name).rows if superseded else []
    contents = (rows[index].content for index in superseded)
    needed = sum(content is not None and bool(store.catalogue.rows_showing(content)) for content in contents)
    return entry.rows - len(current) - needed


def purge(storage: Storage, names: Sequence[str], lock: Lock) -> Purged:
    """Take items out of the store: every row of theirs, and every byte of their features.

    A name is a file, a folder or a path as the store has it. Quarantined shards, and an unfinished rebuild, may hold
    them and are deleted.

    Raises:
        UsageError: The store knows no item of such a name.
    """
    store = _opened(storage)
    what = _to_purge(storage, store, names)
    done = rewrite(storage, store, what.rewrite, lock)
    clear_marks(storage)
    forget_walked(storage, (os.path.realpath(name) for name in names))
    storage.delete(*what.quarantined, layout.CATALOGUE)  # a copy of it would still have their names between its rows
    _opened(storage)
    return Purged(
        **asdict(done),
        purged=len(what.items),
        shared=what.shared,
        still_there=what.still_there,
        removed_quarantined=len(what.quarantined),
        removed_rebuild=rebuild.discard(storage),
    )


@dataclass(frozen=True)
class ForetoldPurge(Foretold):
    """What `purge` would do: see `Purged`.

    Attributes:
        items: The first row of each item that would go, by root and path.
    """

    items: tuple[Row, ...]
    shared: int
    still_there: int
    removed_quarantined: int
    removed_rebuild: bool


def foretell_purge(storage: Storage, store: Store, names: Sequence[str]) -> ForetoldPurge:
    """Say what `purge` would do to the store as it is read here. Takes no lock, and changes nothing.

    Raises:
        UsageError: The store knows no item of such a name.
    """
    what = _to_purge(storage, store, names)
    return ForetoldPurge(
        **asdict(foretell(storage, store, what.rewrite)),
        items=tuple(rows[0] for rows in what.items),
        shared=what.shared,
        still_there=what.still_there,
        removed_quarantined=len(what.quarantined),
        removed_rebuild=bool(shards_in(storage.below(layout.REBUILD)) or storage.list(layout.REBUILD)),
    )


@dataclass(frozen=True)
class _ToPurge:
    """What is to be purged: the rows of each item, what else goes with them, and how that is written."""

    rewrite: Rewrite
    items: Sequence[Sequence[Row]]
    shared: int
    still_there: int
    quarantined: Sequence[str]


def _to_purge(storage: Storage, store: Store, names: Sequence[str]) -> _ToPurge:
    keys = frozenset(key for name in names for key in _matching(store, name))
    items = [store.catalogue.rows_of(*key) for key in sorted(keys)]
    only_theirs = {content for content in _contents(storage, keys) if not _is_shown(store, content, keys)}
    # of what no other item shows, old names go too: they would tell its hash
    traces = frozenset(row.key for row in store.catalogue.rows_with_status("deleted") if row.content in only_theirs)
    doomed = _shards_with(storage, store, keys | traces, only_theirs)
    return _ToPurge(
        Rewrite(doomed, drop=keys | traces),
        items,
        shared=sum(any(row.status == "ok" and row.content not in only_theirs for row in rows) for rows in items),
        still_there=sum(rows[0].status != "deleted" and os.path.lexists(file_on_disk(*rows[0].key)) for rows in items),
        quarantined=[f"{layout.QUARANTINE}/{file.name}" for file in storage.list(layout.QUARANTINE)],
    )


def _contents(storage: Storage, keys: Collection[Key]) -> set[Content]:
    """Give what these items have ever shown, superseded rows included."""
    rows = (row for name in shards_in(storage) for row in Shard(storage, name).rows)
    return {row.content for row in rows if row.content is not None and row.key in keys}


def _is_shown(store: Store, content: Content, keys: Collection[Key]) -> bool:
    """Say whether an item that is none of `keys` shows this content."""
    return any(row.key not in keys for row in store.catalogue.rows_showing(content))


def _shards_with(
    storage: Storage, store: Store, keys: Collection[Key], contents: Collection[Content]
) -> frozenset[str]:
    """Name the shards with a row of these items, or with features or superseded rows of these contents."""
    found = set()
    for entry in store.catalogue.shards:
        current = store.catalogue.current_places(entry.number)
        for index, row in enumerate(Shard(storage, entry.name).rows):
            if row.key in keys or (row.content in contents and (row.has_features or index not in current)):
                found.add(entry.name)
                break
    return frozenset(found)


def _matching(store: Store, name: str) -> set[Key]:
    if not name.strip():
        raise UsageError("an empty name: say which item is to be purged")
    keys = {row.key for row in finding.below(store.catalogue, name, by_place=True)}
    if not keys:
        keys = {row.key for row in finding.below(store.catalogue, name, by_place=False)}
        if len({root for root, _ in keys}) > 1:
            raise UsageError(f"the store has {name} in more than one root; give the whole path")
    if not keys:
        raise UsageError(
            f"the store knows no item at {name}{finding.hint(store.catalogue, name)}; `qvsplit inspect` says which "
            "roots it has"
        )
    return keys
