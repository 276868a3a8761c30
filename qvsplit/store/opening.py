"""Open a store: one folder at one moment, also beside a writer; several folders; or some shards, as one store."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from qvsplit.errors import StoreDamaged, StoreInUse, UsageError
from qvsplit.runtime import arguments
from qvsplit.store.catalogue_file import OnShard, catalogue_of, catalogue_of_shards, no_progress
from qvsplit.store.shard_reader import Shard
from qvsplit.store.shards import refuse_half_placed, shard_files, shard_paths, shards_in
from qvsplit.store.storage import LocalStorage, Storage
from qvsplit.store.store import Store, check_one_config

_ATTEMPTS = 100  # to open a store that is being written
_PAUSE_SECONDS = 0.02


def open_store(*places: str | os.PathLike[str], on_shard: OnShard = no_progress) -> Store:
    """Open the store in the given folders, shards or globs.

        store = qvsplit.open_store("embeds")

    Args:
        places: Where it is: usually one folder.
        on_shard: Hears, with how many of how many, when shards are read that the store's catalogue does not know.

    Raises:
        UsageError: There is none.
        StoreInUse: A rebuilt store is not wholly in place.
        StoreDamaged, ConfigError: See `Shard` and `Store`.
    """
    if not places:
        raise UsageError("places: give the path of a store")
    for place in places:
        arguments.a_path("places", place, "the path of a store")
    if len(places) == 1 and os.path.isdir(places[0]):
        return _open_folder(Path(places[0]), on_shard)
    return _open_several(places, on_shard)


def _open_folder(folder: Path, on_shard: OnShard) -> Store:
    """Open one folder's whole state: as it was at one moment, also beside a writer."""
    storage = LocalStorage(folder)
    for _ in range(_ATTEMPTS):
        if folder.is_dir() and not shard_files(storage):
            time.sleep(_PAUSE_SECONDS)  # a listing beside a compaction may have missed its old shards and its new one
        shard_paths(folder)  # refuses what is no store, and one that is half in place
        files = shard_files(storage)
        try:
            catalogue = catalogue_of(storage, files, on_shard=on_shard)
        except StoreDamaged:
            if shard_files(storage) == files:
                raise
        else:
            # a listing may have missed a new shard, and the old one that it replaces: two alike have missed nothing
            if shard_files(storage) == files:
                refuse_half_placed(storage)
                return Store(catalogue, storage, lambda: _open_folder(folder, no_progress))
            catalogue.close()
        time.sleep(_PAUSE_SECONDS)
    raise StoreInUse(f"{folder} is changing faster than it can be read; try again later")


def _open_several(places: Sequence[str | os.PathLike[str]], on_shard: OnShard) -> Store:
    """Open what several folders hold, or some shards of one, as one store."""
    names: dict[str, dict[str, None]] = {}  # folder → names of shards, each once, in order
    for place in places:
        for path in shard_paths(place):
            names.setdefault(str(path.parent), {})[path.name] = None
    wanted = [(LocalStorage(Path(folder)), name) for folder, some in names.items() for name in some]
    shards = []
    for done, (storage, name) in enumerate(wanted):
        on_shard(done, len(wanted))
        shards.append(Shard(storage, name))
    on_shard(len(wanted), len(wanted))
    return store_of(shards)


def store_of(shards: Sequence[Shard]) -> Store:
    """Give the store of these very shards, the first being the oldest."""
    check_one_config([(shard.where, shard.schema) for shard in shards])
    storages = [shard.storage for shard in shards]
    return Store(catalogue_of_shards(shards, ", ".join(dict.fromkeys(one.location for one in storages))), storages)


def read_store(storage: Storage) -> Store:
    """Open all shards of `storage` themselves, without the published catalogue."""
    return store_of([Shard(storage, name) for name in shards_in(storage)])
