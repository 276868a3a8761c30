"""An album: a folder of shards under one recipe. What is in it, what is new to it, and who may write.

The shards are the ledger; there is no other state. A later row of the same root and path supersedes an earlier
one, shards being ordered by name. Embeddings are found by content: any row with the same sha256 that holds them.
Needs no torch.
"""

from __future__ import annotations

import glob
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qvsplit.errors import AlbumDamaged, AlbumInUse, RecipeError, UsageError, some_of
from qvsplit.folders import SHARD_NAME, Found, Walked, file_on_disk, is_within, storable
from qvsplit.index import Tally
from qvsplit.recipe import Made, Recipe
from qvsplit.rows import open_shards
from qvsplit.store import Embeds, Row, Shard

REBUILD = ".rebuild"  # below an album: the one that will take its place
COMPLETE = "complete.json"  # in there: it is whole, and its shards are being put in place


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
    def roots(self) -> frozenset[str]:
        """The roots of all rows, as stored."""
        return frozenset(root for root, _ in self._current)

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

    def is_home(self, sha256: bytes, shard: Shard, index: int) -> bool:
        """Whether row `index` of `shard` is where the embeddings of this content are taken from."""
        return self._homes.get(sha256) == (shard, index)

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
    """The album in the given folders, shards or globs, a later one's rows over an earlier one's.

    UsageError if there is none. AlbumInUse where a rebuilt album is not wholly in place.
    """
    paths: dict[Path, None] = {}
    for place in places:
        paths |= dict.fromkeys(shard_paths(place))
    return Album(open_shards(list(paths)))


def shard_paths(place: str | os.PathLike[str]) -> list[Path]:
    """The shards that a file, a folder or a glob names, sorted. UsageError if there are none."""
    text = os.fspath(place)
    path = Path(text)
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            refuse_half_placed(path)
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


def shard_number(path: Path) -> int:
    """The number in a shard's name."""
    return int(path.name.split("-")[1].split(".")[0])


def rebuild_folder(folder: Path) -> Path:
    """Where the album that is to take this one's place grows."""
    return folder / REBUILD


def rebuild_marker(folder: Path) -> Path:
    """What says that it is whole."""
    return rebuild_folder(folder) / COMPLETE


def placed_from(folder: Path) -> int | None:
    """The number from which on shards are those of a rebuilt album that is being put in place; None where none is."""
    try:
        return int(json.loads(rebuild_marker(folder).read_text())["first"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise AlbumDamaged(f"{rebuild_marker(folder)} cannot be read; remove {rebuild_folder(folder)}") from None


def refuse_half_placed(folder: Path) -> None:
    """AlbumInUse while a rebuilt album is being put in place, or that was cut short: what is there is not whole."""
    if placed_from(folder) is not None:
        raise AlbumInUse(
            f"{folder} is being replaced by its rebuild; run `qvsplit extract` again if that was cut short"
        )


def _order(path: Path) -> tuple[int, str]:
    """Shards by their number, other names after them."""
    numbered = SHARD_NAME.fullmatch(path.name)
    return (int(numbered[1]) if numbered else 1 << 62, str(path))


def _check_one_recipe(shards: Sequence[Shard]) -> None:
    for shard in shards[1:]:
        if (shard.recipe, shard.hidden_size) == (shards[0].recipe, shards[0].hidden_size):
            continue
        differences = shards[0].recipe.differences(shard.recipe)
        if shards[0].hidden_size != shard.hidden_size:
            differences.append(f"hidden_size: {shards[0].hidden_size}, not {shard.hidden_size}")
        if differences:
            raise RecipeError(
                f"{shards[0].path} and {shard.path} were made under two recipes ({some_of(differences)}); "
                "ask them apart"
            )


def next_number(folder: Path) -> int:
    """The number of the next shard: one above the highest there is, or ever was as far as can be seen."""
    numbers = [int(match[1]) for name in os.listdir(folder) if (match := SHARD_NAME.match(name))]
    return max(numbers, default=0) + 1


def shard_path(folder: Path, number: int) -> Path:
    """Where the shard of this number lies."""
    return folder / f"shard-{number:06d}.parquet"


# ---------------------------------------------------------------------------------------------------- what is new


@dataclass(frozen=True)
class Plan:
    """What a walk found, held against an album: `pictures` = `candidates` + `unchanged` + `failed_before`.

    `candidates` have to be read: they are new, or their stat says nothing. `gone` are rows whose file is no longer
    there and that do not say so yet; those of them in `doubtful` lie below a folder that is there and wholly empty,
    as the place of a disk is that is not mounted.
    """

    pictures: int
    candidates: list[Found]
    unchanged: int
    failed_before: int
    gone: list[Row]
    doubtful: Mapping[tuple[str, str], str]  # key → that folder
    unlisted: frozenset[tuple[str, str]]  # folders with rows that the walk does not meet, though their files are there


def plan(
    album: Album,
    walked: Walked,
    tallies: Mapping[tuple[str, str], Tally],
    *,
    retry_failed: bool = False,
    checksum: bool = False,
    on_note: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Sort what a walk found into known and to be read. `tallies` tell of the folders that the walk knew.

    Only what lies below the walk's paths can be gone, and of a path in which nothing at all was found nothing is: that
    is more often a disk that is not mounted; `on_note` hears of it.
    """
    here: set[tuple[str, str]] = set()
    changed: list[Found] = []
    again: list[Found] = []  # behind the others: a run that is cut short gets to what is new
    known = {"ok": 0, "failed": 0}

    def sort(one: Found) -> None:
        row = album.current(one.root, one.path)
        if row is None or not is_known(album, row, one):
            changed.append(one)
        elif checksum or (row.status == "failed" and retry_failed):
            again.append(one)
        else:
            known[row.status] += 1

    for listing in walked.listings:
        for one in listing.found():
            here.add((one.root, one.path))
            sort(one)
    entire = {folder for folder in walked.known if not tallies[folder].missing}
    for start in walked.empty:
        number = sum(row.status != "gone" and is_within(file_on_disk(row.root, row.path), start) for row in album.rows)
        if number:
            on_note(no_longer_there(start, number))
    alive = [start for start in walked.starts if start not in walked.empty]
    gone, unlisted = [], []
    for row in album.rows:
        if (
            row.status != "gone"
            and row.key not in here
            and row.folder not in entire
            and any(is_within(file_on_disk(row.root, row.path), start) for start in alive)
        ):
            if _is_gone(row):
                gone.append(row)
            elif (found := _found(row)) is not None:  # named one by one once, or met under another name first
                unlisted.append(row.folder)
                sort(found)
    return Plan(
        pictures=walked.pictures + len(unlisted),
        candidates=changed + again,
        unchanged=known["ok"] + sum(tallies[folder].ok for folder in walked.known),
        failed_before=known["failed"] + sum(tallies[folder].failed for folder in walked.known),
        gone=gone,
        doubtful=_doubtful(gone),
        unlisted=frozenset(unlisted),
    )


def _found(row: Row) -> Found | None:
    """The row's file as a walk would have it; None where it cannot be looked at."""
    try:
        status = os.stat(file_on_disk(row.root, row.path))
    except OSError:
        return None
    return Found(row.root, row.path, status.st_size, storable(status.st_mtime_ns))


def _doubtful(gone: Sequence[Row]) -> dict[tuple[str, str], str]:
    """Rows whose nearest folder that still exists holds nothing at all → that folder."""
    nearest: dict[str, str] = {}  # folder → the nearest that exists, if that is empty, else ""
    doubtful = {}
    for row in gone:
        folder = os.path.dirname(file_on_disk(row.root, row.path))
        if folder not in nearest:
            nearest[folder] = _empty_above(folder)
        if nearest[folder]:
            doubtful[row.key] = nearest[folder]
    return doubtful


def _empty_above(folder: str) -> str:
    while True:
        try:
            return "" if os.listdir(folder) else folder
        except (FileNotFoundError, NotADirectoryError):
            folder = os.path.dirname(folder)
        except OSError:
            return ""


def no_longer_there(start: str, number: int) -> str:
    """What is said of a path given in which nothing was found, though the album has rows of it."""
    return (
        f"{start} holds no pictures any more; its {number:,} rows are left as they are, in case it is not mounted (if "
        "they were deleted, `qvsplit forget` takes them out)"
    )


def _is_gone(row: Row) -> bool:
    """Whether the file is certainly not there; one that merely cannot be looked at is not gone."""
    try:
        os.lstat(file_on_disk(row.root, row.path))
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def is_known(album: Album, row: Row, one: Found) -> bool:
    """Whether the stat alone shows that nothing is to be done. A row without mtime was written while it was fresh."""
    if row.status == "gone" or row.mtime_ns is None or (row.size, row.mtime_ns) != (one.size, one.mtime_ns):
        return False
    # else its embeddings went with a shard that is no longer there
    return row.status == "failed" or (row.sha256 is not None and album.home(row.sha256) is not None)


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
