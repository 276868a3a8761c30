"""What of the folders that a store is kept up to date with is not in it, or has changed since: listed, and not decoded.

A gate that judges a store has to know it: an image that nobody has extracted has passed no check.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from qvsplit.pipeline.plan import plan
from qvsplit.runtime.names import file_on_disk, name_on_disk
from qvsplit.sources.folders import IMAGE_SUFFIXES, SUFFIXES, LocalFolders
from qvsplit.sources.source import Entry
from qvsplit.store.row import Row
from qvsplit.store.storage import LocalStorage
from qvsplit.store.store import Store
from qvsplit.store.walked import Walked, walked_folders

NOT_EXTRACTED = "is not yet extracted; run `qvsplit extract` again"
CHANGED = "has changed on disk since it was extracted; run `qvsplit extract` again"


@dataclass(frozen=True)
class Freshness:
    """What a store lacks.

    Attributes:
        new: A failed row for each item that has none, with the reason as its error.
        changed: A failed row for each item whose file has other bytes by now.
        gone: Folders that do not exist on this machine: nothing is known of them.
    """

    new: tuple[Row, ...] = ()
    changed: tuple[Row, ...] = ()
    gone: tuple[str, ...] = ()


def freshness(store: Store, folder: Path) -> Freshness:
    """Hold the store in `folder` against the folders that it was extracted from. Files of other bytes are hashed."""
    new: dict[tuple[str, str], Row] = {}
    changed: dict[tuple[str, str], Row] = {}
    gone = []
    for walked in walked_folders(LocalStorage(folder)):
        if not os.path.isdir(walked.folder):
            gone.append(walked.folder)
            continue
        for entry in _to_read(store, folder, walked):
            row = store.current(entry.root, entry.path)
            if row is None or row.status == "deleted":
                new[entry.key] = _failed(entry, NOT_EXTRACTED)
            elif row.status == "ok" and _has_other_bytes(entry, row):
                changed[entry.key] = replace(_failed(entry, CHANGED), kind=row.kind)
    return Freshness(tuple(new.values()), tuple(changed.values()), tuple(gone))


def _to_read(store: Store, folder: Path, walked: Walked) -> tuple[Entry, ...]:
    """List what an extraction of that folder would read now."""
    source = LocalFolders(
        [walked.folder],
        out=os.path.realpath(folder),
        roots=frozenset(map(name_on_disk, store.roots)),
        suffixes=SUFFIXES if walked.videos else IMAGE_SUFFIXES,
        exclude=walked.exclude,
    )
    tallies = store.catalogue.tallies
    listings = list(source.list({one: tally.digest for one, tally in tallies.items() if tally.digest}))
    return plan(listings, source.scope, store, tallies).to_read


def _failed(entry: Entry, reason: str) -> Row:
    return Row(root=entry.root, path=entry.path, sha256=None, size=entry.size, status="failed", error=reason)


def _has_other_bytes(entry: Entry, row: Row) -> bool:
    """Say whether the file is another than the row's; its time may have changed alone."""
    if entry.size != row.size:
        return True
    try:
        with open(file_on_disk(entry.root, entry.path), "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() != row.sha256
    except OSError:
        return True
