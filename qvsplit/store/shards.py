"""Which shards there are: in a folder, behind a glob, and while a rebuilt store is being put in place."""

from __future__ import annotations

import glob
import json
import os
import stat
from pathlib import Path

from qvsplit.errors import StoreDamaged, StoreInUse, UsageError
from qvsplit.store import layout
from qvsplit.store.storage import LocalStorage, Storage, StoredFile


def shard_files(storage: Storage) -> list[tuple[int, StoredFile]]:
    """List the shards with their numbers, the oldest first; none where there is no store. OSError if unreadable."""
    numbered = ((layout.shard_number(file.name), file) for file in storage.list())
    return sorted(
        ((number, file) for number, file in numbered if number is not None), key=lambda one: (one[0], one[1].name)
    )


def shards_in(storage: Storage) -> list[str]:
    """List the names of the shards, the oldest first."""
    return [file.name for _, file in shard_files(storage)]


def next_number(storage: Storage) -> int:
    """Give the number of the next shard: one above the highest there is."""
    return max((number for number, _ in shard_files(storage)), default=0) + 1


class ShardNumbers:
    """Gives the numbers of new shards, each once, above all that there are. Only for whoever holds the store's lock.

    The folder is listed once: listing it for every shard would cost more with each one.
    """

    def __init__(self, storage: Storage, first: int = 1) -> None:
        self._storage = storage
        self._first = first
        self._last: int | None = None

    def take(self) -> int:
        """Give the next one."""
        self._last = max(self._first, next_number(self._storage)) if self._last is None else self._last + 1
        return self._last


def shard_paths(place: str | os.PathLike[str]) -> list[Path]:
    """List the shards that a file, a folder or a glob names, sorted. UsageError if there are none."""
    text = os.fspath(place)
    path = Path(text)
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            refuse_half_placed(LocalStorage(path))
            found = [path / name for name in shards_in(LocalStorage(path))]
            if not found:
                raise UsageError(f"{text} holds no shards; extract images into it with `out={text}`")
        else:
            found = [path]
    except (FileNotFoundError, NotADirectoryError):
        found = []
    except OSError as error:
        raise UsageError(f"{text} cannot be read ({error.strerror})") from None
    if found:
        return found
    try:
        found = [Path(match) for match in glob.glob(text)]
    except (OSError, ValueError):
        found = []
    if not found:
        raise UsageError(f"no store or shard at {text}; make one with `qvsplit extract PHOTOS` and `out=DIR`")
    return sorted(found, key=layout.in_order)


def refuse_half_placed(storage: Storage) -> None:
    """StoreInUse while a rebuilt store is being put in place, or where that was cut short: it is not whole."""
    if placed_from(storage) is not None:
        raise StoreInUse(
            f"{storage.location} is being replaced by its rebuild; run `qvsplit extract` again if that was cut short"
        )


def placed_from(storage: Storage) -> int | None:
    """Give the number from which on shards are those of a rebuilt store that is being put in place; None where none is.

    Raises:
        StoreDamaged: What says so cannot be read.
    """
    try:
        with storage.open(layout.REBUILD_COMPLETE) as stream:
            return int(json.loads(stream.read())["first"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise StoreDamaged(
            f"{storage.where(layout.REBUILD_COMPLETE)} cannot be read; remove {storage.where(layout.REBUILD)}"
        ) from None
