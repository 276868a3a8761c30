"""Which folders a store is brought up to date with, and what of them is left out: of all runs, the last of each folder.

What lies in these folders and has no row has not been extracted. Like the history, this cannot be rebuilt from the
shards; the next runs over the folders note it again. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from qvsplit.errors import DiskError, StoreDamaged
from qvsplit.runtime.names import is_within, name_on_disk, stored_name
from qvsplit.store import layout
from qvsplit.store.storage import Storage


@dataclass(frozen=True)
class Walk:
    """Folders that one run walks together, and how: see `sources.folders.LocalFolders`.

    Attributes:
        folders: As the file system has them, in the run's order: what can be come by from two of them belongs to the
            first.
        exclude: Patterns of what is left out.
        videos: Whether videos are taken.
    """

    folders: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    videos: bool = True


def walks(storage: Storage) -> list[Walk] | None:
    """Give the walks, sorted, each folder once; None where there is no such list, so that they are not known.

    Raises:
        StoreDamaged: The list is no such list.
        DiskError: It cannot be read.
    """
    try:
        with storage.open(layout.WALKED) as stream:
            content = stream.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DiskError(
            f"{storage.where(layout.WALKED)} cannot be read ({error.strerror or error}); change its permissions, or "
            "mount its disk again"
        ) from error
    except ValueError:
        raise _damaged(storage) from None
    try:
        found = _walks_in(json.loads(content))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _damaged(storage) from None
    return sorted(found, key=lambda one: one.folders)


def note_walk(storage: Storage, walk: Walk) -> None:
    """Note how folders are walked now, in place of how each was walked before. Writes only what is new.

    A list that is damaged is begun again. DiskError where it cannot be read or written.
    """
    try:
        before = walks(storage)
    except StoreDamaged:
        before = None
        if not walk.folders:
            return  # it would look as if no folder had been walked
    left = _without(before or [], lambda folder: folder in walk.folders)
    now = sorted([*left, *([walk] if walk.folders else [])], key=lambda one: one.folders)
    if now != before:
        _write(storage, now)


def forget_walked(storage: Storage, below: Iterable[str]) -> None:
    """Forget the folders that are, or are within, any of these. DiskError where it cannot be read or written.

    A list that is damaged may have their names: it is emptied, which leaves it damaged.
    """
    places = list(below)
    try:
        before = walks(storage) or []
    except StoreDamaged:
        with storage.put_whole(layout.WALKED):
            return
    left = _without(before, lambda folder: any(is_within(folder, place) for place in places))
    if left != before:
        _write(storage, left)


def _without(before: Sequence[Walk], is_gone: Callable[[str], bool]) -> list[Walk]:
    kept = [replace(one, folders=tuple(folder for folder in one.folders if not is_gone(folder))) for one in before]
    return [one for one in kept if one.folders]


def _walks_in(content: object) -> list[Walk]:
    """Give what `_write` has written. ValueError, TypeError or KeyError for anything else."""
    if not isinstance(content, list):
        raise TypeError("not a list")
    found = []
    for one in content:
        folders, exclude, videos = one["folders"], one["exclude"], one["videos"]
        lists = isinstance(folders, list) and isinstance(exclude, list) and isinstance(videos, bool)
        if not lists or not all(isinstance(text, str) for text in (*folders, *exclude)):
            raise TypeError("not a walk")
        found.append(Walk(tuple(map(name_on_disk, folders)), tuple(exclude), videos))
    return found


def _damaged(storage: Storage) -> StoreDamaged:
    return StoreDamaged(f"{storage.where(layout.WALKED)} is damaged; run `qvsplit extract` on your folders again")


def _write(storage: Storage, found: Iterable[Walk]) -> None:
    content = [asdict(one) | {"folders": [stored_name(folder) for folder in one.folders]} for one in found]
    with storage.put_whole(layout.WALKED) as stream:
        stream.write(json.dumps(content, indent=1).encode())
