"""How far a store is behind the disk: files it does not have, and items that may have changed. Nothing is decoded.

A gate that judges a store has to know it: an image that nobody has extracted has passed no check.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qvsplit.pipeline.view import source_of
from qvsplit.runtime.names import file_on_disk, is_within, name_on_disk, stored_name
from qvsplit.sources.files import sha256_of
from qvsplit.sources.folders import presence_of, root_of
from qvsplit.sources.source import Key
from qvsplit.store.row import Row
from qvsplit.store.storage import LocalStorage
from qvsplit.store.walked import walks

NOT_EXTRACTED = "is not yet extracted; run `qvsplit extract` again"
CHANGED = "has changed on disk since it was extracted; run `qvsplit extract` again"
NOT_LOOKED_AT = "cannot be looked at on disk, so that it is not known whether it has changed"
_NO_FOLDER = (FileNotFoundError, NotADirectoryError)


@dataclass(frozen=True)
class Freshness:
    """What is known of the folders that stores are kept up to date with.

    Attributes:
        new: A failed row for each file in them that the stores do not have, with the reason as its error.
        unreadable: Folders that could not be listed → why.
        not_found: Folders that do not exist on this machine, or have nothing of their items: nothing is known of them.
        unknown: Stores that do not say which folders these are.
    """

    new: tuple[Row, ...]
    unreadable: Mapping[str, str]
    not_found: tuple[str, ...]
    unknown: tuple[str, ...]


def freshness(known: Collection[Key], places: Sequence[str]) -> Freshness:
    """List the folders that the stores in `places` are kept up to date with; `known` are the items of all of them."""
    files = {file_on_disk(*key) for key in known}  # two stores may have one file under two roots
    roots = {root for root, _ in known}
    new: dict[Key, Row] = {}
    unreadable: dict[str, str] = {}
    not_found: dict[str, None] = {}
    unknown = []
    for place in places:
        found = walks(LocalStorage(Path(place)))
        if found is None:
            unknown.append(place)
        for walk in found or ():
            errors = {folder: error for folder in walk.folders if (error := _error_opening(folder)) is not None}
            for folder, error in errors.items():
                if isinstance(error, _NO_FOLDER):
                    not_found[folder] = None
                else:
                    unreadable[folder] = error.strerror or str(error)
            folders = [folder for folder in walk.folders if folder not in errors]
            source = source_of(folders, place, roots, exclude=walk.exclude, videos=walk.videos)
            entries = [entry for listing in source.list({}) for entry in listing.entries()]
            new |= {one.key: _failed(one.key, NOT_EXTRACTED) for one in entries if one.file not in files}
            unreadable |= source.unreadable
            empty = source.scope.empty  # as the place of a disk is that is not mounted
            not_found |= dict.fromkeys(one for one in empty if any(is_within(file, one) for file in files))
    return Freshness(tuple(new.values()), unreadable, tuple(not_found), tuple(unknown))


def outdated(rows: Iterable[Row], unreadable: Mapping[str, str], *, by_content: bool) -> list[Row]:
    """Give a failed row for each item of `rows` that is not known to be on disk as it was extracted, with the reason.

    One whose file does not exist is passed over. Where size or time differ the file is hashed if `by_content`; else
    that is enough.
    """
    found = []
    for row in {row.key: row for row in rows}.values():
        reason = _reason(row, unreadable, by_content=by_content)
        if reason is not None:
            found.append(_failed(row.key, reason, row.kind))
    return found


def roots_not_found(rows: Iterable[Row]) -> list[str]:
    """Give the roots of these rows that do not exist on this machine."""
    roots = sorted({name_on_disk(row.root) for row in rows})
    return [root for root in roots if isinstance(_error_opening(root), _NO_FOLDER)]


def unreadable_rows(unreadable: Mapping[str, str], rows: Iterable[Row]) -> list[Row]:
    """Give a failed row for each folder that could not be listed and holds none of `rows`: what is in it may be new."""
    rows = list(rows)
    roots = frozenset(name_on_disk(row.root) for row in rows)
    files = [file_on_disk(*row.key) for row in rows]
    return [
        _failed(_key_of(folder, roots), f"is a folder that cannot be read ({why}): what is new in it is not known")
        for folder, why in unreadable.items()
        if not any(is_within(file, folder) for file in files)
    ]


def _error_opening(folder: str) -> OSError | None:
    """Give what is in the way of listing a folder."""
    try:
        os.scandir(folder).close()
    except OSError as error:
        return error
    return None


def _reason(row: Row, unreadable: Mapping[str, str], *, by_content: bool) -> str | None:
    """Say why the item is not known to be as it was extracted."""
    file = file_on_disk(*row.key)
    for folder, why in unreadable.items():
        if is_within(file, folder):
            return f"cannot be held against the disk: its folder cannot be read ({why})"
    presence = presence_of(row.key)
    if presence.state == "unknown":
        return NOT_LOOKED_AT
    if presence.entry is None:
        return None
    if not by_content:
        return None if (row.size, row.mtime_ns) == (presence.entry.size, presence.entry.mtime_ns) else CHANGED
    if presence.entry.size != row.size:
        return CHANGED
    return None if row.version == presence.entry.version else _change_of_content(file, row.sha256)


def _change_of_content(file: str, sha256: str | None) -> str | None:
    now = sha256_of(file)
    if now is None:
        return NOT_LOOKED_AT
    return None if now == sha256 else CHANGED


def _failed(key: Key, reason: str, kind: str = "image") -> Row:
    return Row(*key, sha256=None, size=0, status="failed", error=reason, kind=kind)


def _key_of(folder: str, roots: frozenset[str]) -> Key:
    """Name a folder as an item of it would be named; a root by its parent."""
    root = root_of(os.path.dirname(folder), roots) or os.path.dirname(folder)
    return stored_name(root), stored_name(folder[len(root) :].strip("/"))
