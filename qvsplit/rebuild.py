"""An album made anew, under another recipe if need be, beside the old one, and put in its place as a whole.

The new one grows as an album of its own in a hidden folder below the old one, so that a killed rebuild is taken up
like any other run. From the moment its marker is on disk it is the album: the old shards go, the new ones move up, and
whoever comes in between is told to let that be finished first (`album.refuse_half_placed`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from qvsplit.album import (
    Album,
    next_number,
    placed_from,
    rebuild_folder,
    rebuild_marker,
    shard_number,
    shard_path,
    shards_in,
)
from qvsplit.folders import file_on_disk, is_within, name_on_disk
from qvsplit.lock import clear_leftovers
from qvsplit.store import disk_errors, sync_folder


def stage(folder: Path) -> Path:
    """Where the new album of `folder` grows."""
    staging = rebuild_folder(folder)
    with disk_errors(folder):
        staging.mkdir(exist_ok=True)
        sync_folder(folder)  # a power cut must not take it away once old shards go
    clear_leftovers(staging)
    _above(folder, staging)
    return staging


def _above(folder: Path, staging: Path) -> None:
    """Number the staged shards above the album's own: an ordinary run in between may have used their numbers."""
    found = shards_in(staging)
    shift = next_number(folder) - min(map(shard_number, found), default=1 << 60)
    if shift > 0:
        with disk_errors(folder):
            for path in reversed(found):  # the highest first: their order holds at every moment
                os.rename(path, shard_path(staging, shard_number(path) + shift))
            sync_folder(staging)


def discard(folder: Path) -> bool:
    """Give up a new album that is not whole; whether there was one. Only for whoever holds the lock."""
    if not rebuild_folder(folder).exists():
        return False
    with disk_errors(folder):
        shutil.rmtree(rebuild_folder(folder))
        sync_folder(folder)
    return True


def left_out(album: Album, starts: Sequence[str]) -> list[str]:
    """Roots with pictures that lie below none of the paths given, as the file system has them."""
    return sorted(
        {
            name_on_disk(row.root)
            for row in album.rows
            if row.status != "gone" and not any(is_within(file_on_disk(row.root, row.path), one) for one in starts)
        }
    )


def put_in_place(folder: Path) -> None:
    """The new album of `folder` is whole: from here on it is the album."""
    staging = rebuild_folder(folder)
    with disk_errors(folder):
        first = min(map(shard_number, shards_in(staging)))
        with rebuild_marker(folder).open("x") as stream:
            json.dump({"first": first}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        sync_folder(staging)
    finish(folder)


def finish(folder: Path) -> None:
    """Put a whole new album in place, where that was begun; else nothing. May die anywhere, and be called again."""
    first = placed_from(folder)
    if first is None:
        return
    staging = rebuild_folder(folder)
    with disk_errors(folder):
        for path in shards_in(folder):
            if shard_number(path) < first:
                path.unlink()
        for path in shards_in(staging):
            os.rename(path, folder / path.name)
        sync_folder(folder)  # before the marker goes: what it stands for must be on disk
        for name in os.listdir(staging):
            if name != rebuild_marker(folder).name:
                (staging / name).unlink()
        rebuild_marker(folder).unlink()
        staging.rmdir()
        sync_folder(folder)
