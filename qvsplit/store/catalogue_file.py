"""The catalogue's file: `.qvsplit/catalogue.sqlite`, made beside the old one and renamed over it, never changed.

So a reader sees one whole catalogue, also beside a writer, without locks, on a read-only mount and on a network disk.
The hash of its pages stands at its end: a file that is not what was written counts as none. What is in it is used for
those shards only that are still the ones that were read.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from qvsplit.errors import DiskError, QvsplitError, ShardDamaged
from qvsplit.runtime.names import absolute
from qvsplit.store import layout
from qvsplit.store.catalogue import SCHEMA, VERSION, Catalogue, FolderTally
from qvsplit.store.catalogue_builder import CatalogueBuilder
from qvsplit.store.row import Key
from qvsplit.store.shard_reader import Shard, sound_checksum
from qvsplit.store.shards import shard_files
from qvsplit.store.storage import Storage, StoredFile

_MAGIC = b"QVCAT001"  # then 32 bytes of BLAKE2b over all before it
_TRAILER_BYTES = len(_MAGIC) + 32
_CACHE_KIB = 16 << 10

OnShard = Callable[[int, int], None]  # shards read, of how many


def no_progress(done: int, total: int) -> None:
    """Say nothing."""


# ------------------------------------------------------------------------------------------------------- on the disk


def read_published(storage: Storage) -> Catalogue | None:
    """Open the store's catalogue; None where there is none, or not what was written."""
    path = storage.local_path(layout.CATALOGUE)
    if path is None:
        return None
    try:
        with storage.open(layout.CATALOGUE) as stream:
            if not _is_whole(stream):
                return None
            connection = _connected(path)
            # a writer may have put another in its place: what was hashed must be what is read
            if os.stat(path).st_ino != os.fstat(stream.fileno()).st_ino:
                connection.close()
                return read_published(storage)
    except (OSError, ValueError, sqlite3.Error):
        return None
    catalogue = Catalogue(connection, storage.location)
    try:
        _ = catalogue.shards  # as they are declared by a version that this one knows
        _ = catalogue.cures
    except (sqlite3.Error, ValueError, TypeError, KeyError, RecursionError, QvsplitError):
        catalogue.close()
        return None
    return catalogue


def _connected(path: Path) -> sqlite3.Connection:
    """Open the file as it is, without locks. ValueError unless its tables are exactly ours: nobody else's views."""
    name = quote(os.fsencode(absolute(path)))
    connection = sqlite3.connect(
        f"file:{name}?mode=ro&immutable=1", uri=True, check_same_thread=False, isolation_level=None
    )
    try:
        for pragma in ("trusted_schema = OFF", "cell_size_check = ON", f"cache_size = -{_CACHE_KIB}"):
            connection.execute(f"PRAGMA {pragma}")
        found = connection.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY rowid").fetchall()
        version = connection.execute("SELECT value FROM facts WHERE name = 'version'").fetchone()
        if ";\n".join(sql for (sql,) in found) != SCHEMA.strip().rstrip(";") or version != (VERSION,):
            raise ValueError("tables of another version")
    except BaseException:
        connection.close()
        raise
    return connection


def _is_whole(stream: IO[bytes]) -> bool:
    end = stream.seek(0, os.SEEK_END) - _TRAILER_BYTES
    if end <= 0:
        return False
    stream.seek(end)
    trailer = stream.read()
    stream.seek(0)
    return trailer == _MAGIC + _digest(stream, end)


def _digest(stream: IO[bytes], length: int) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    while length and (some := stream.read(min(length, 1 << 20))):
        digest.update(some)
        length -= len(some)
    return digest.digest()


def _publish(storage: Storage, staged: Path) -> None:
    """Put a finished catalogue in the old one's place. Where that cannot be done nothing is lost but time."""
    with suppress(OSError, DiskError):
        with staged.open("r+b") as stream:
            length = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            digest = _digest(stream, length)
            stream.write(_MAGIC + digest)
        storage.move(f"{layout.STAGING}/{staged.name}", layout.CATALOGUE)


# ------------------------------------------------------------------------------------------------- bringing up to date


@dataclass(frozen=True)
class Noted:
    """What a run found, for the next one.

    Attributes:
        tallies: The folders in which nothing is left to do, by root and path.
        cures: What the run could read, and under which limits.
    """

    tallies: Mapping[Key, FolderTally]
    cures: Mapping[str, Any]


def known_catalogue(storage: Storage, files: Sequence[tuple[int, StoredFile]]) -> Catalogue | None:
    """Give the published catalogue, if it is that of these shards; no shard is opened."""
    published = read_published(storage)
    if published is not None and not _Difference(storage, published, files, check_footers=False).is_empty:
        published.close()
        return None
    return published


def catalogue_of(
    storage: Storage,
    files: Sequence[tuple[int, StoredFile]],
    *,
    noted: Noted | None = None,
    on_shard: OnShard = no_progress,
    on_damaged: Callable[[str, ShardDamaged], None] | None = None,
) -> Catalogue:
    """Give the catalogue of these shards; only those that the published one does not know are opened.

    What had to be made is published, where a writer of this store has made the folder for that.

    Args:
        storage: The store.
        files: Its shards.
        noted: What a run found, if there is news.
        on_shard: Hears of each shard that is opened.
        on_damaged: Called with a shard's name and what is wrong with it; the shard is left out. Where it is None that
            is an error.

    Raises:
        ShardDamaged, ConfigError: A shard cannot be used.
        StoreDamaged: A shard went while it was being opened.
    """
    published = read_published(storage)
    difference = _Difference(storage, published, files)
    if published is not None and difference.is_empty and noted is None:
        return published
    making = _Making(storage, files, noted, on_shard, on_damaged)
    staged = _staged(storage)
    try:
        if staged is not None:
            with suppress(sqlite3.Error):  # no room for it beside the shards
                return making.make(published, difference, staged)
        return making.make(published, difference, None)
    except sqlite3.Error as error:
        raise DiskError(
            f"the catalogue of {storage.location} has no room in the folder for temporary files ({error}); make some"
        ) from None
    finally:
        if published is not None:
            published.close()


@dataclass(frozen=True)
class _Making:
    """What a catalogue is made of: see `catalogue_of`."""

    storage: Storage
    files: Sequence[tuple[int, StoredFile]]
    noted: Noted | None
    on_shard: OnShard
    on_damaged: Callable[[str, ShardDamaged], None] | None

    def make(self, published: Catalogue | None, difference: _Difference, staged: Path | None) -> Catalogue:
        """Make it in the file `staged` and publish it; or where SQLite keeps what is temporary."""
        with ExitStack() as stack:
            if staged is not None:
                stack.callback(_unlink, staged)
            builder = _begun(published, difference, staged, self.storage.location)
            on_error = stack.enter_context(ExitStack())
            on_error.callback(builder.connection.close)
            self._add(builder, difference.new if builder.is_a_copy else self.files)
            if self.noted is not None:
                builder.put_tallies(self.noted.tallies, self.noted.cures)
            catalogue = builder.finish()
            # what others have purged meanwhile must not be published again
            if staged is not None and shard_files(self.storage) == list(self.files):
                _publish(self.storage, staged)
            on_error.pop_all()
        return catalogue

    def _add(self, builder: CatalogueBuilder, files: Sequence[tuple[int, StoredFile]]) -> None:
        for done, (number, file) in enumerate(files):
            self.on_shard(done, len(files))
            try:
                builder.add(number, file, Shard(self.storage, file.name))
            except ShardDamaged as error:
                if self.on_damaged is None:
                    raise
                self.on_damaged(file.name, error)
        if files:
            self.on_shard(len(files), len(files))


class _Difference:
    """What has become of the shards that a catalogue knows.

    Attributes:
        new: Shards that it does not know.
        touched: Shards whose version is another, and whose footer is the one that it was: copied, say.
        removed: Numbers of shards that are no longer what it knows.
    """

    def __init__(
        self,
        storage: Storage,
        catalogue: Catalogue | None,
        files: Sequence[tuple[int, StoredFile]],
        *,
        check_footers: bool = True,
    ) -> None:
        self.new: list[tuple[int, StoredFile]] = []
        self.touched: list[tuple[int, StoredFile]] = []
        known = {shard.number: shard for shard in catalogue.shards} if catalogue is not None else {}
        for number, file in files:
            shard = known.get(number)
            if shard is not None and (shard.name, shard.size) == (file.name, file.size):
                if shard.version == file.version:
                    del known[number]
                    continue
                if check_footers and sound_checksum(storage, file.name) == shard.checksum:
                    del known[number]
                    self.touched.append((number, file))
                    continue
            self.new.append((number, file))
        self.removed = list(known)

    @property
    def is_empty(self) -> bool:
        """Whether the catalogue is that of these shards."""
        return not self.new and not self.removed


def _staged(storage: Storage) -> Path | None:
    """Give a name for the new file; None where only memory is left: nobody may write here, or no writer ever did.

    A reader makes no folders in a store: they would be in the way of its owner, should another user have made them.
    """
    folder = storage.local_path(layout.STAGING)
    if folder is None or not os.access(folder, os.W_OK):
        return None
    return folder / f".catalogue.{secrets.token_hex(8)}.tmp"


def _begun(published: Catalogue | None, difference: _Difference, staged: Path | None, where: str) -> CatalogueBuilder:
    """Begin with a copy of what is published, as far as that is of use; else from nothing."""
    if published is not None:
        builder = _builder(staged, where, published)
        if builder.remove(difference.removed):
            for number, file in difference.touched:
                builder.note_version(number, file)
            return builder
        builder.connection.close()
        if staged is not None:
            _unlink(staged)
    return _builder(staged, where, None)


def _builder(staged: Path | None, where: str, base: Catalogue | None) -> CatalogueBuilder:
    """Begin in a new database, with a copy of `base` if there is one."""
    connection = _empty(staged)
    try:
        if base is not None:
            base.connection.backup(connection)
        return CatalogueBuilder(connection, where)
    except BaseException:
        connection.close()
        raise


def _unlink(staged: Path) -> None:
    """Delete what was begun; a writer that has just taken the lock may have cleared that folder."""
    with suppress(OSError):
        staged.unlink()


def _empty(staged: Path | None) -> sqlite3.Connection:
    """Open a new database: the staged file, or one of SQLite's own that it deletes with the connection."""
    name = "" if staged is None else os.fsencode(staged)
    return sqlite3.connect(name, check_same_thread=False, isolation_level=None)


def catalogue_of_shards(shards: Sequence[Shard], where: str) -> Catalogue:
    """Give the catalogue of any shards, wherever they lie, the first being the oldest. It is kept nowhere."""
    builder = CatalogueBuilder(_empty(None), where)
    for number, shard in enumerate(shards, 1):
        builder.add(number, StoredFile(shard.name, 0, ""), shard)
    return builder.finish()
