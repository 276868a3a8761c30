"""Shards written anew: merged, rid of what is superseded or to be forgotten, saved from what is damaged.

What holds at every moment, also after a death: new shards come after all others and repeat current rows as they are;
only when they are on disk for good are the old ones taken away. So a reader finds the same pictures before, between
and after.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qvsplit.album import Album, next_number, shard_path, shards_in
from qvsplit.errors import ShardDamaged, UsageError
from qvsplit.folders import file_on_disk, is_within, name_on_disk
from qvsplit.index import INDEX_FILE
from qvsplit.lock import Lock
from qvsplit.rebuild import discard
from qvsplit.recipe import Made
from qvsplit.rows import ROWS_FILE
from qvsplit.store import SHARD_BYTES, SHARD_ROWS, Embeds, Row, Shard, ShardWriter, disk_errors, read_seal, sync_folder

ASIDE = ".damaged"  # ends the name of a shard that was set aside
MARK = ".damage"  # ends the name of what `verify` leaves beside a shard in which it found damage
SMALL_BYTES = SHARD_BYTES // 2
WORTHWHILE = 0.2  # of a shard's rows or embeddings that nobody needs any more

Key = tuple[str, str]


@dataclass(frozen=True)
class Compacted:
    """What `compact` or `forget` did. Sizes in bytes on disk."""

    shards_before: int
    shards_after: int
    bytes_before: int
    bytes_after: int
    rows_dropped: int
    forgotten: int = 0  # pictures
    shared: int = 0  # of those forgotten: pictures whose embeddings stay, as another picture has the same bytes
    still_there: int = 0  # whose file is still where it was
    removed_aside: int = 0  # damaged shards that had been set aside
    removed_rebuild: bool = False  # an unfinished one, which may have held them


# -------------------------------------------------------------------------------------------------------- compact


def compact(folder: Path, lock: Lock, *, on_shard: Callable[[str], None] = lambda name: None) -> Compacted:
    """Merge small shards, and drop rows and embeddings that nothing current needs. Nothing is encoded again."""
    album = Album([Shard(path) for path in shards_in(folder)])
    small = [shard for shard in album.shards if _size(shard) < SMALL_BYTES]
    alike = [shard.made for shard in small]  # only such can be merged
    doomed = {shard.path for shard in small if alike.count(shard.made) > 1}
    needed = _needed(album.rows)
    for shard in album.shards:
        dead = sum(_is_dead(album, shard, index, row, needed) for index, row in enumerate(shard.rows))
        if dead >= max(1, WORTHWHILE * len(shard.rows)):
            doomed.add(shard.path)
    return _rewritten(folder, album, doomed, lock, on_shard=on_shard)


def forget(folder: Path, names: Sequence[str], lock: Lock) -> Compacted:
    """Take pictures out of the album: every row of theirs, and every byte of their embeddings.

    A name is a file, a folder or a path as the album has it. UsageError for one that the album does not know. Shards
    that had been set aside as damaged, and may hold them, are removed.
    """
    album = Album([Shard(path) for path in shards_in(folder)])
    keys = {key for name in names for key in _matching(album, name)}
    forgotten = [row for row in album.rows if row.key in keys]
    kept = [row for row in album.rows if row.key not in keys]
    contents = {
        row.sha256 for shard in album.shards for row in shard.rows if row.key in keys and row.sha256 is not None
    }
    alive = {row.sha256 for row in kept if row.status == "ok"}
    # of what nothing else shows, the old names go too: they would tell its hash
    traces = {row.key for row in kept if row.status == "gone" and row.sha256 in contents - alive}
    doomed = {
        shard.path
        for shard in album.shards
        if any(
            row.key in keys | traces
            or (row.sha256 in contents - alive and (row.has_embeds or album.current(*row.key) is not row))
            for row in shard.rows
        )
    }
    aside = [folder / name for name in os.listdir(folder) if name.endswith(ASIDE)]
    done = _rewritten(folder, album, doomed, lock, drop=keys | traces)
    clear_marks(folder)
    with disk_errors(folder):
        for path in aside:
            path.unlink()
        (folder / INDEX_FILE).unlink(missing_ok=True)  # it names folders
        (folder / ROWS_FILE).unlink(missing_ok=True)  # it names pictures
        sync_folder(folder)
    return replace(
        done,
        forgotten=len(forgotten),
        shared=sum(row.status == "ok" and row.sha256 in alive for row in forgotten),
        still_there=sum(
            row.status != "gone" and os.path.lexists(file_on_disk(row.root, row.path)) for row in forgotten
        ),
        removed_aside=len(aside),
        removed_rebuild=discard(folder),
    )


def _matching(album: Album, name: str) -> set[Key]:
    if not name.strip():
        raise UsageError("an empty name: say which picture is to be forgotten")
    places = {os.path.abspath(name), os.path.realpath(name)}
    keys = {
        row.key for row in album.rows if any(is_within(file_on_disk(row.root, row.path), place) for place in places)
    }
    if not keys:
        keys = {row.key for row in album.rows if is_within(name_on_disk(row.path), name.rstrip("/"))}
        if len({root for root, _ in keys}) > 1:
            raise UsageError(f"the album has {name} in more than one root; give the whole path")
    if not keys:
        raise UsageError(f"the album knows no picture at {name}; `qvsplit inspect` says which roots it has")
    return keys


# ----------------------------------------------------------------------------------------------------------- mend


def mend(folder: Path, lock: Lock, on_note: Callable[[str], None], *, model_named: bool) -> tuple[Album, int]:
    """The album with its damaged shards set aside, what is sound in them written anew; and how many there were.

    Damaged is what does not open, and what `verify` has marked. The pictures that cannot be saved are left without
    embeddings, so that a run of `extract` sees them again. Nothing is deleted: a shard set aside keeps its bytes.
    ShardDamaged where no shard is sound and no model is named: nothing would tell how the album is to be made anew.
    """
    with disk_errors(folder):
        paths = shards_in(folder)
    marked = damage_marks(folder)
    shards: list[Shard] = []
    damaged: dict[Path, str] = {}
    unsound: ShardDamaged | None = None
    for path in paths:
        try:
            shards.append(Shard(path))
        except ShardDamaged as error:
            damaged[path] = error.what
            unsound = error
            continue
        if path in marked and marked[path][0] == read_seal(path).hex():
            damaged[path] = marked[path][1]
    if unsound is not None and not shards and not model_named:
        raise ShardDamaged(
            f"{unsound.path} is damaged ({unsound.what}), and no other shard tells what {folder} was made with; name "
            "its model with --model to have it made anew",
            unsound.path,
            unsound.what,
        )
    if damaged:
        lock.announce()
        album = Album(shards)
        openable = {shard.path for shard in shards if shard.path in damaged}
        lost: list[Row] = []
        if openable:
            _rewritten(folder, album, openable, lock, on_lost=lost.append, remove=False)
        for path, what in damaged.items():
            with disk_errors(folder):
                aside = _aside(path)
            saved = "" if path not in openable else ", but for what is sound in it"
            on_note(f"{path.name} is damaged ({what}): set aside as {aside.name}; its pictures are seen anew{saved}")
        with disk_errors(folder):
            sync_folder(folder)
        shards = [Shard(path) for path in shards_in(folder)]
    with disk_errors(folder):
        for path in marked:
            _mark_of(path).unlink(missing_ok=True)
    clear_marks(folder)
    return Album(shards), len(damaged)


def mark_damage(path: Path, what: str) -> bool:
    """Have the next `extract` set the shard at `path` aside. False where that cannot be written down."""
    try:
        seal = read_seal(path).hex()
    except (OSError, ValueError):
        return True  # it shows by itself
    try:
        _mark_of(path).write_text(json.dumps({"seal": seal, "what": what}))
    except OSError:
        return False
    return True


def clear_marks(folder: Path) -> None:
    """Remove the marks of shards that are no longer there."""
    with disk_errors(folder):
        for name in os.listdir(folder):
            if name.startswith(".shard-") and name.endswith(MARK) and not (folder / name[1 : -len(MARK)]).exists():
                (folder / name).unlink()


def damage_marks(folder: Path) -> dict[Path, tuple[str, str]]:
    """The shards in `folder` that are marked: path → checksum of the shard that was meant, what was found."""
    marks = {}
    for path in shards_in(folder):
        with suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(_mark_of(path).read_text())
            marks[path] = (str(told["seal"]), str(told["what"]))
    return marks


def _mark_of(path: Path) -> Path:
    return path.with_name(f".{path.name}{MARK}")


def _aside(path: Path) -> Path:
    number = 0
    while (aside := path.with_name(f"{path.name}{ASIDE}" if not number else f"{path.name}.{number}{ASIDE}")).exists():
        number += 1
    os.rename(path, aside)
    return aside


# -------------------------------------------------------------------------------------------------------- rewrite


def _rewritten(
    folder: Path,
    album: Album,
    doomed: set[Path],
    lock: Lock,
    *,
    drop: set[Key] | frozenset[Key] = frozenset(),
    on_lost: Callable[[Row], None] | None = None,
    on_shard: Callable[[str], None] = lambda name: None,
    remove: bool = True,
) -> Compacted:
    """Write what is current in the `doomed` shards into new ones, but for the rows to `drop`, and remove the doomed.

    Where embeddings cannot be read `on_lost` hears of their row, which is then written without; else it is an error.
    """
    before = [(shard.path, _size(shard)) for shard in album.shards]
    if doomed:
        lock.announce()
        old = [shard for shard in album.shards if shard.path in doomed]
        rows = sum(len(shard.rows) for shard in old)
        written = _Rewriter(folder, album, drop, on_lost, on_shard).write(old)
        if remove:
            with disk_errors(folder):
                for shard in old:
                    shard.path.unlink()
                sync_folder(folder)
    else:
        rows = written = 0
    with disk_errors(folder):
        after = [(path, path.stat().st_size) for path in shards_in(folder)]
    return Compacted(
        len(before), len(after), sum(size for _, size in before), sum(size for _, size in after), max(0, rows - written)
    )


class _Rewriter:
    """Writes shards behind all others. Rows keep their order; embeddings are copied bit for bit."""

    def __init__(
        self,
        folder: Path,
        album: Album,
        drop: set[Key] | frozenset[Key],
        on_lost: Callable[[Row], None] | None,
        on_shard: Callable[[str], None],
    ) -> None:
        self.folder = folder
        self.album = album
        self.on_lost = on_lost
        self.on_shard = on_shard
        self.kept = [row for row in album.rows if row.key not in drop]
        self.needed = _needed(self.kept)
        self.left = {row.key for row in self.kept}
        self.places = {row.key: (shard.path, index) for shard in album.shards for index, row in enumerate(shard.rows)}
        self.writer: ShardWriter | None = None
        self.made: Made | None = None
        self.rows = 0

    def write(self, old: Sequence[Shard]) -> int:
        """Everything current of `old`; gives the number of rows written."""
        homes = {
            (shard.path, index): self._carrier(row)
            for shard in old
            for index, row in enumerate(shard.rows)
            if row.has_embeds and row.sha256 is not None and self.album.is_home(row.sha256, shard, index)
        }
        carriers = {place: row for place, row in homes.items() if row is not None}
        later = {row.key for row in carriers.values()}  # written where their embeddings are met, wherever they stand
        try:
            for shard in old:
                self.on_shard(shard.path.name)
                for index, row in enumerate(shard.rows):
                    carrier = carriers.get((shard.path, index))
                    if carrier is not None:
                        embeds = self._embeds(shard, index)
                        self._add(shard, replace(carrier, has_embeds=embeds is not None), embeds)
                    elif row.key in self.left and row.key not in later and self.places[row.key] == (shard.path, index):
                        self._add(shard, replace(row, has_embeds=False), None)
            self._finish()
        except BaseException:
            if self.writer is not None:
                self.writer.abandon()
            raise
        return self.rows

    def _carrier(self, row: Row) -> Row | None:
        """The current row that is to hold the embeddings that `row` holds: its own if that still shows them."""
        assert row.sha256 is not None
        wanting = self.needed.get(row.sha256, [])
        return next((one for one in wanting if one.key == row.key), wanting[0] if wanting else None)

    def _embeds(self, shard: Shard, index: int) -> Embeds | None:
        try:
            return shard.embeds(index)
        except ShardDamaged:
            if self.on_lost is None:
                raise
            self.on_lost(shard.rows[index])
            return None

    def _add(self, shard: Shard, row: Row, embeds: Embeds | None) -> None:
        if self.writer is None or self.made != shard.made:
            self._finish()
            assert self.album.recipe is not None
            assert self.album.hidden_size is not None
            self.made = shard.made
            with disk_errors(self.folder):
                path = shard_path(self.folder, next_number(self.folder))
            self.writer = ShardWriter(
                path,
                recipe=self.album.recipe,
                made=shard.made,
                hidden_size=self.album.hidden_size,
            )
        self.writer.add(row, None if embeds is None else embeds.raw)
        self.left.discard(row.key)
        self.rows += 1
        if self.writer.bytes >= SHARD_BYTES or self.writer.rows >= SHARD_ROWS:
            self._finish()

    def _finish(self) -> None:
        if self.writer is not None:
            writer, self.writer = self.writer, None
            writer.finish()


def _needed(rows: Sequence[Row]) -> dict[bytes, list[Row]]:
    """Content that current rows show → those rows."""
    needed: dict[bytes, list[Row]] = {}
    for row in rows:
        if row.status == "ok" and row.sha256 is not None:
            needed.setdefault(row.sha256, []).append(row)
    return needed


def _is_dead(album: Album, shard: Shard, index: int, row: Row, needed: dict[bytes, list[Row]]) -> bool:
    """Whether neither the row nor the embeddings it holds are of use."""
    holds = row.has_embeds and row.sha256 in needed and album.is_home(row.sha256, shard, index)
    return not holds and album.current(*row.key) is not row


def _size(shard: Shard) -> int:
    return shard.path.stat().st_size
