"""An album: a folder of shards under one recipe. What is in it, what is new to it, and who may write.

The shards are the ledger; there is no other state. A later row of the same root and path supersedes an earlier
one, shards being ordered by name. Embeddings are found by content: any row with the same sha256 that holds them.
Needs no torch.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qvsplit.errors import AlbumDamaged, AlbumInUse, DiskError, RecipeError, UsageError, some_of
from qvsplit.images import SHARD_NAME, Found, name_on_disk
from qvsplit.recipe import Made, Recipe
from qvsplit.store import Embeds, Row, Shard, disk_errors

LOCK_FILE = ".qvsplit.lock"
_TEMPORARY = re.compile(r"\.shard-\d{6,}\.parquet\.\d+\.tmp")


class Album:
    """Shards opened for reading, under one recipe, the oldest first.

    `rows` are the current rows, sorted by root and path; `embeds(row)` gives a picture's embeddings.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        _check_one_recipe(self.shards)
        self._current: dict[tuple[str, str], Row] = {}
        self._homes: dict[bytes, tuple[Shard, int]] = {}  # content hash → where its embeddings are
        for shard in self.shards:
            for index, row in enumerate(shard.rows):
                self._current[row.key] = row
                if row.has_embeds and row.sha256 is not None:
                    self._homes[row.sha256] = (shard, index)

    @property
    def recipe(self) -> Recipe | None:
        """The recipe of every row; None for an album without shards."""
        return self.shards[0].recipe if self.shards else None

    @property
    def made(self) -> Made | None:
        """Where the newest rows came from."""
        return self.shards[-1].made if self.shards else None

    @property
    def name(self) -> str:
        """The folders its shards lie in, as they were given."""
        return ", ".join(dict.fromkeys(str(shard.path.parent) for shard in self.shards))

    @property
    def hidden_size(self) -> int | None:
        """Width of a token."""
        return self.shards[0].hidden_size if self.shards else None

    @property
    def rows(self) -> list[Row]:
        """The current row of every picture, whatever its status, sorted by root and path."""
        return sorted(self._current.values(), key=lambda row: row.key)

    def current(self, root: str, path: str) -> Row | None:
        """The current row of one picture."""
        return self._current.get((root, path))

    def home(self, sha256: bytes) -> Row | None:
        """The row that holds the embeddings of the content with this hash."""
        place = self._homes.get(sha256)
        return None if place is None else place[0].rows[place[1]]

    def embeds(self, row: Row) -> Embeds:
        """The checked embeddings of an `ok` row, its own or those of the same bytes under another name."""
        if row.status != "ok" or row.sha256 is None:
            raise UsageError(
                f"{row.path} has no embeddings: it is {row.status}" + (f" ({row.error})" if row.error else "")
            )
        place = self._homes.get(row.sha256)
        if place is None:
            raise AlbumDamaged(
                f"the embeddings of {row.path} are in no shard given; give the whole album with --embeds, or run "
                "`qvsplit extract` again"
            )
        return place[0].embeds(place[1])

    def __iter__(self) -> Iterator[Row]:
        """The current rows that can be asked: those with status `ok`."""
        return (row for row in self.rows if row.status == "ok")

    def __len__(self) -> int:
        """How many pictures can be asked."""
        return sum(row.status == "ok" for row in self._current.values())


def open_album(*places: str | os.PathLike[str]) -> Album:
    """The album in the given folders, shards or globs, a later one's rows over an earlier one's. UsageError if none."""
    paths: dict[Path, None] = {}
    for place in places:
        paths |= dict.fromkeys(shard_paths(place))
    return Album([Shard(path) for path in paths])


def shard_paths(place: str | os.PathLike[str]) -> list[Path]:
    """The shards that a file, a folder or a glob names, sorted. UsageError if there are none."""
    text = os.fspath(place)
    path = Path(text)
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            found = shards_in(path)
            if not found:
                raise UsageError(f"{text} holds no shards; make some with `qvsplit extract PHOTOS --out {text}`")
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
        raise UsageError(f"no album or shard at {text}; make one with `qvsplit extract PHOTOS --out DIR`")
    return sorted(found, key=_order)


def shards_in(folder: Path) -> list[Path]:
    """The shards in `folder`, the oldest first; none where there is no such folder. OSError if it cannot be read."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted((folder / name for name in names if SHARD_NAME.fullmatch(name)), key=_order)


def _order(path: Path) -> tuple[int, str]:
    """Shards by their number, other names after them."""
    numbered = SHARD_NAME.fullmatch(path.name)
    return (int(numbered[1]) if numbered else 1 << 62, str(path))


def _check_one_recipe(shards: Sequence[Shard]) -> None:
    for shard in shards[1:]:
        differences = shards[0].recipe.differences(shard.recipe)
        if shards[0].hidden_size != shard.hidden_size:
            differences.append(f"hidden_size: {shards[0].hidden_size}, not {shard.hidden_size}")
        if differences:
            raise RecipeError(
                f"{shards[0].path} and {shard.path} were made under two recipes ({some_of(differences)}); "
                "ask them apart"
            )


# ------------------------------------------------------------------------------------------------------- writing


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` as its only writer, made if need be; what a killed run left half-written is removed.

    The lock is the kernel's (flock), so it ends with the process that holds it, however that dies. AlbumInUse if
    another holds it, DiskError where the folder cannot be written or has no locks.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _take(descriptor, folder)
        with disk_errors(folder):
            for name in os.listdir(folder):
                if _TEMPORARY.fullmatch(name):
                    (folder / name).unlink()
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AlbumInUse(
            f"{folder} is being written by {_holder(descriptor)}; wait for it, or choose another --out"
        ) from None
    except OSError as error:
        if error.errno in {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}:
            raise DiskError(f"{folder} is on a file system without locks; choose an --out on a local disk") from None
        raise
    with suppress(OSError):  # only tells others who we are; a full disk is met, and said, where it matters
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        told = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {int(told['pid'])} on {told['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def next_shard(folder: Path) -> Path:
    """The name of the next shard: one above the highest there is."""
    numbers = [int(match[1]) for name in os.listdir(folder) if (match := SHARD_NAME.fullmatch(name))]
    return folder / f"shard-{max(numbers, default=0) + 1:06d}.parquet"


# ---------------------------------------------------------------------------------------------------- what is new


@dataclass(frozen=True)
class Plan:
    """What a walk found, held against an album.

    `candidates` have to be read: they are new, or their stat says nothing; `skipped` are known by their stat;
    `gone` are rows whose file is no longer there.
    """

    candidates: list[Found]
    skipped: int
    gone: list[Row]


def plan(
    album: Album,
    found: Sequence[Found],
    roots: frozenset[str],
    *,
    retry_failed: bool,
    on_note: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Sort what a walk found into known and to be read.

    Rows under other roots than `roots` are never gone, nor are those of a root in which nothing at all was found:
    that is more often a disk that is not mounted; `on_note` hears of it.
    """
    candidates = [one for one in found if not _is_known(album, one, retry_failed)]
    here = {(one.root, one.path) for one in found}
    alive = {one.root for one in found}
    for root in sorted(roots - alive):
        if any(row.root == root and row.status != "gone" for row in album.rows):
            on_note(f"{root} holds no pictures any more; its rows are left as they are, in case it is not mounted")
    gone = [
        row
        for row in album.rows
        if row.status != "gone" and row.root in roots & alive and row.key not in here and _is_gone(row)
    ]
    return Plan(candidates, len(found) - len(candidates), gone)


def _is_gone(row: Row) -> bool:
    """Whether the file is certainly not there; one that merely cannot be looked at is not gone."""
    try:
        os.lstat(os.path.join(name_on_disk(row.root), name_on_disk(row.path)))
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _is_known(album: Album, one: Found, retry_failed: bool) -> bool:
    """Whether the stat alone shows that nothing is to be done. A row without mtime was written while it was fresh."""
    row = album.current(one.root, one.path)
    if row is None or row.status == "gone" or (row.status == "failed" and retry_failed):
        return False
    if row.status == "ok" and (row.sha256 is None or album.home(row.sha256) is None):
        return False  # its embeddings went with a shard that is no longer there
    return row.mtime_ns is not None and (row.size, row.mtime_ns) == (one.size, one.mtime_ns)


def gone_row(row: Row) -> Row:
    """The row that says `row`'s file is no longer there."""
    return Row(
        root=row.root, path=row.path, sha256=row.sha256, size=row.size, mtime_ns=row.mtime_ns, kind=row.kind,
        width=row.width, height=row.height, status="gone", error=None, grid_thw=row.grid_thw, n_tokens=row.n_tokens,
        has_embeds=False,
    )  # fmt: skip


def counts(rows: Sequence[Row]) -> Mapping[str, int]:
    """How many rows have each status."""
    tally = {"ok": 0, "failed": 0, "gone": 0}
    for row in rows:
        tally[row.status] += 1
    return tally
