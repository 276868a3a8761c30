"""compact and purge: shards merged, rid of what is superseded, or of items that are to go for good."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from qvsplit.errors import UsageError
from qvsplit.runtime.names import file_on_disk, is_within, name_on_disk
from qvsplit.store import layout, rebuild
from qvsplit.store.lock import Lock
from qvsplit.store.repair import clear_marks
from qvsplit.store.rewrite import Rewrite, Rewritten, rewrite, rows_by_content
from qvsplit.store.row import Content, Key, Row
from qvsplit.store.shard_reader import Shard
from qvsplit.store.shards import placed_from, shards_in
from qvsplit.store.storage import LocalStorage, Storage
from qvsplit.store.store import Store, read_store
from qvsplit.store.store_writer import SHARD_BYTES

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
    folder = Path(place)
    if folder.is_file():
        raise UsageError(f"{folder} is a file; give the store's folder")
    storage = LocalStorage(folder)
    if not folder.is_dir() or (not shards_in(storage) and placed_from(storage) is None):
        raise UsageError(f"no store at {folder}; give a folder of shards")
    with storage.lock(wait=wait, on_note=on_note) as lock:
        rebuild.finish(storage)
        yield storage, lock


def compact(storage: Storage, lock: Lock) -> Rewritten:
    """Merge small shards, and drop rows and features that nothing current needs. Nothing is encoded again."""
    store = read_store(storage)
    sizes = {file.name: file.size for file in storage.list()}
    small = frozenset(shard.name for shard in store.shards if sizes[shard.name] < SMALL_BYTES)
    doomed = set(small if len(small) > 1 else ())
    needed = rows_by_content(store.rows)
    for shard in store.shards:
        dead = sum(_is_dead(store, shard, index, row, needed) for index, row in enumerate(shard.rows))
        if dead >= max(1, WORTHWHILE * len(shard.rows)):
            doomed.add(shard.name)
    return rewrite(storage, store, Rewrite(frozenset(doomed)), lock)


def _is_dead(store: Store, shard: Shard, index: int, row: Row, needed: dict[Content, list[Row]]) -> bool:
    """Say whether neither the row nor the features it holds are of use."""
    content = row.content
    holds = row.has_features and content is not None and content in needed and store.is_home(content, shard, index)
    return not holds and not store.is_current(row)


def purge(storage: Storage, names: Sequence[str], lock: Lock) -> Purged:
    """Take items out of the store: every row of theirs, and every byte of their features.

    A name is a file, a folder or a path as the store has it. Quarantined shards, and an unfinished rebuild, may hold
    them and are deleted.

    Raises:
        UsageError: The store knows no item of such a name.
    """
    store = read_store(storage)
    keys = frozenset(key for name in names for key in _matching(store, name))
    purged = [row for row in store.rows if row.key in keys]
    kept = [row for row in store.rows if row.key not in keys]
    contents = {row.content for shard in store.shards for row in shard.rows if row.key in keys and row.content}
    alive = {row.content for row in kept if row.status == "ok"}
    only_theirs = contents - alive
    # of what no other item shows, old names go too: they would tell its hash
    traces = frozenset(row.key for row in kept if row.status == "deleted" and row.content in only_theirs)
    doomed = frozenset(
        shard.name
        for shard in store.shards
        if any(
            row.key in keys | traces or (row.content in only_theirs and (row.has_features or not store.is_current(row)))
            for row in shard.rows
        )
    )
    quarantined = [f"{layout.QUARANTINE}/{file.name}" for file in storage.list(layout.QUARANTINE)]
    done = rewrite(storage, store, Rewrite(doomed, drop=keys | traces), lock)
    clear_marks(storage)
    storage.delete(*quarantined, layout.INDEX, layout.ROWS)  # the caches name folders and items
    return Purged(
        **asdict(done),
        purged=len(purged),
        shared=sum(row.status == "ok" and row.content in alive for row in purged),
        still_there=sum(
            row.status != "deleted" and os.path.lexists(file_on_disk(row.root, row.path)) for row in purged
        ),
        removed_quarantined=len(quarantined),
        removed_rebuild=rebuild.discard(storage),
    )


def _matching(store: Store, name: str) -> set[Key]:
    if not name.strip():
        raise UsageError("an empty name: say which item is to be purged")
    places = {os.path.abspath(name), os.path.realpath(name)}
    keys = {
        row.key for row in store.rows if any(is_within(file_on_disk(row.root, row.path), place) for place in places)
    }
    if not keys:
        keys = {row.key for row in store.rows if is_within(name_on_disk(row.path), name.rstrip("/"))}
        if len({root for root, _ in keys}) > 1:
            raise UsageError(f"the store has {name} in more than one root; give the whole path")
    if not keys:
        raise UsageError(f"the store knows no item at {name}; `qvsplit inspect` says which roots it has")
    return keys
