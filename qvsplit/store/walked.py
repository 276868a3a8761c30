"""Which folders a store is brought up to date with, and what of them is left out: of all runs, the last of each folder.

What lies in these folders and has no row has not been extracted. Like the history, this cannot be rebuilt from the
shards; where it is missing nothing is known to be missing from the store. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass

from qvsplit.runtime.names import is_within, name_on_disk, stored_name
from qvsplit.store import layout
from qvsplit.store.storage import Storage


@dataclass(frozen=True)
class Walked:
    """One folder, as the file system has it, and how it is walked: see `sources.folders.LocalFolders`."""

    folder: str
    exclude: tuple[str, ...] = ()
    videos: bool = True


def walked_folders(storage: Storage) -> list[Walked]:
    """Give the folders, sorted. A file that is no such list is taken for none."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError), storage.open(layout.WALKED) as stream:
        return sorted(
            (
                Walked(name_on_disk(folder), tuple(map(str, how["exclude"])), bool(how["videos"]))
                for folder, how in json.loads(stream.read()).items()
            ),
            key=lambda one: one.folder,
        )
    return []


def note_walked(storage: Storage, folders: Iterable[Walked]) -> None:
    """Note how `folders` are walked now. Writes only what is new. DiskError where it cannot be written."""
    before = walked_folders(storage)
    now = {one.folder: one for one in [*before, *folders]}
    if list(now.values()) != before:
        _write(storage, now.values())


def forget_walked(storage: Storage, below: Iterable[str]) -> None:
    """Forget the folders that are, or are within, any of these. DiskError where it cannot be written."""
    places = list(below)
    before = walked_folders(storage)
    left = [one for one in before if not any(is_within(one.folder, place) for place in places)]
    if left != before:
        _write(storage, left)


def _write(storage: Storage, folders: Iterable[Walked]) -> None:
    content = {}
    for one in sorted(folders, key=lambda one: one.folder):
        how = asdict(one)
        content[stored_name(how.pop("folder"))] = how
    with storage.put_whole(layout.WALKED) as stream:
        stream.write(json.dumps(content, indent=1).encode())
