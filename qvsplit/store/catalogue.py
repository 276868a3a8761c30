"""The catalogue: what is current in a store's shards, as tables of SQLite that are asked one question at a time.

It is a cache, and never changed once it is made: `catalogue_builder` makes it, `catalogue_file` keeps it on disk. Of
a million rows only those are read that somebody asks for. Standard library only: a run with nothing to do comes no
further than this.
"""

from __future__ import annotations

import functools
import json
import re
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qvsplit.errors import StoreDamaged
from qvsplit.runtime.memory import garbage_collection_paused
from qvsplit.store import layout
from qvsplit.store.config import ExtractionConfig
from qvsplit.store.row import ROW_FIELDS, Content, Key, Row, is_whole, item_row, row_error, unknown_value
from qvsplit.store.schema import ShardSchema

VERSION = 3
# Long, and the same for many rows: `texts` has each once, and so has memory
INTERNED = ("error", "warnings", "grid_thw", "placeholder", "inputs", "media")
_ROOT, _SHA256, _GRID, _HAS_FEATURES = map(ROW_FIELDS.index, ("root", "sha256", "grid_thw", "has_features"))
_INTERNED = tuple(ROW_FIELDS.index(name) for name in INTERNED if name != "grid_thw")
_SHORT = tuple(map(ROW_FIELDS.index, ("kind", "status", "error_kind")))  # few different ones
_TYPES = {"path": "TEXT", "part": "INTEGER", "generation": "INTEGER", "status": "TEXT", "sha256": "BLOB"}
_ROWS_AT_A_TIME = 1000
_MANY = 10_000  # items that are found faster in one go than one by one
_MAX_TEXTS = 1 << 17  # kept in memory
_WILDCARD, _ESCAPED = re.compile("[%_!]"), r"!\g<0>"  # of LIKE

SCHEMA = f"""
CREATE TABLE facts(name TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
CREATE TABLE schemas(id INTEGER PRIMARY KEY, content TEXT NOT NULL UNIQUE);
CREATE TABLE shards(number INTEGER PRIMARY KEY, name TEXT NOT NULL, size INTEGER NOT NULL, version TEXT NOT NULL,
 checksum BLOB NOT NULL, schema INTEGER NOT NULL, rows INTEGER NOT NULL, feature_tokens INTEGER NOT NULL);
CREATE TABLE roots(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE folders(id INTEGER PRIMARY KEY, root TEXT NOT NULL, path TEXT NOT NULL, digest TEXT, ok INTEGER,
 failed INTEGER, not_found INTEGER, excluded INTEGER, UNIQUE(root, path));
CREATE TABLE texts(id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE);
CREATE TABLE rows(root INTEGER NOT NULL, folder INTEGER NOT NULL, shard INTEGER NOT NULL, row INTEGER NOT NULL,
 {", ".join(f'"{name}" {_TYPES.get(name, "")}'.strip() for name in ROW_FIELDS if name != "root")},
 PRIMARY KEY(root, path, part)) WITHOUT ROWID;
CREATE TABLE contents(sha256 BLOB NOT NULL, part INTEGER NOT NULL, shard INTEGER NOT NULL, row INTEGER NOT NULL,
 last INTEGER NOT NULL, PRIMARY KEY(sha256, part)) WITHOUT ROWID;
"""
_COLUMNS = ", ".join(f'rows."{name}"' for name in ROW_FIELDS)
_HELD = "EXISTS (SELECT 1 FROM contents WHERE contents.sha256 = rows.sha256 AND contents.part = rows.part)"

Place = tuple[int, int]  # the number of a shard, and of a row in it


@dataclass(frozen=True, slots=True)
class FolderTally:
    """One folder's items at the end of a run in which nothing was left to do there.

    Attributes:
        digest: Its listing's; empty where it has none.
        ok: Items with status ok.
        failed: Items with status failed.
        not_found: Items whose file was not found and that are not marked deleted.
        excluded: Items whose file is there and is left out of every walk.
    """

    digest: str
    ok: int
    failed: int
    not_found: int
    excluded: int = 0


@dataclass(frozen=True, slots=True)
class CataloguedShard:
    """A shard as it was when its rows were read.

    Attributes:
        number: Its place among the others: of two rows of the same generation the one of the higher number counts.
        name: Its name in the storage.
        size: Bytes.
        version: As the storage gives it.
        checksum: SHA-256 of its footer.
        schema: What it declares.
        rows: How many it has, superseded ones included.
        feature_tokens: Tokens of the features in it.
    """

    number: int
    name: str
    size: int
    version: str
    checksum: bytes
    schema: ShardSchema
    rows: int
    feature_tokens: int


class Catalogue:
    """Current rows, where features are, and what was found in each folder.

    Safe to ask from several threads at once.

    Args:
        connection: An open SQLite database with the tables of SCHEMA; not changed from here on.
        where: The store, for messages.
    """

    def __init__(self, connection: sqlite3.Connection, where: str) -> None:
        self.connection = connection
        self._where = where
        self._lock = threading.RLock()
        self._texts: dict[int, str] = {}
        self._grids: dict[int, tuple[int, int, int]] = {}
        self._alike: dict[str, str] = {}
        self._sorted_by_content = False

    def close(self) -> None:
        """Let go of the file. A thread that asks meanwhile is waited for: SQLite does not survive both at once."""
        with self._lock:
            self.connection.close()

    def _all(self, query: str, values: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            return self.connection.execute(query, tuple(values)).fetchall()

    def _one(self, query: str, values: Iterable[Any] = ()) -> tuple[Any, ...] | None:
        with self._lock:
            found: tuple[Any, ...] | None = self.connection.execute(query, tuple(values)).fetchone()
            return found

    # --------------------------------------------------------------------------------------------- shards, folders

    def fact(self, name: str, default: Any) -> Any:
        """Give a fact that was noted about the whole store."""
        found = self._one("SELECT value FROM facts WHERE name = ?", [name])
        return default if found is None else found[0]

    @cached_property
    def shards(self) -> tuple[CataloguedShard, ...]:
        """Every shard, the oldest first."""
        schemas = {
            number: ShardSchema.from_json(json.loads(content), self._where)
            for number, content in self._all("SELECT id, content FROM schemas")
        }
        found = self._all(
            "SELECT number, name, size, version, checksum, schema, rows, feature_tokens FROM shards ORDER BY number"
        )
        return tuple(
            CataloguedShard(number, name, size, version, checksum, schemas[schema], rows, feature_tokens)
            for number, name, size, version, checksum, schema, rows, feature_tokens in found
        )

    @cached_property
    def config(self) -> ExtractionConfig | None:
        """What the shards declare together: of videos what any of them says. None where there are no shards."""
        configs = [shard.schema.config for shard in self.shards]
        return functools.reduce(ExtractionConfig.merged, configs) if configs else None

    @cached_property
    def generation(self) -> int:
        """The highest generation of any row, current or not."""
        return int(self.fact("generation", 0))

    @cached_property
    def cures(self) -> Mapping[str, Any]:
        """What the last run could read, and under which limits: failures may be cured where that has changed."""
        cures: Mapping[str, Any] = json.loads(self.fact("cures", "{}"))
        return cures

    @cached_property
    def roots(self) -> frozenset[str]:
        """The roots of all current rows, as stored."""
        return frozenset(self._roots.values())

    @cached_property
    def _roots(self) -> Mapping[int, str]:
        return dict(self._all("SELECT id, name FROM roots"))

    @cached_property
    def _root_ids(self) -> Mapping[str, int]:
        return {name: number for number, name in self._roots.items()}

    @cached_property
    def folders(self) -> Mapping[Key, int]:
        """The folders that current rows lie in, root and path, each with its number here."""
        return {(root, path): number for number, root, path in self._all("SELECT id, root, path FROM folders")}

    @cached_property
    def tallies(self) -> Mapping[Key, FolderTally]:
        """What was found in each folder in which nothing was left to do, by root and path."""
        query = "SELECT root, path, digest, ok, failed, not_found, excluded FROM folders WHERE digest IS NOT NULL"
        return {(root, path): FolderTally(*tally) for root, path, *tally in self._all(query)}

    @cached_property
    def unsettled(self) -> frozenset[Key]:
        """The folders in which something was left to do, root and path."""
        return frozenset(
            (root, path) for root, path in self._all("SELECT root, path FROM folders WHERE digest IS NULL")
        )

    # ------------------------------------------------------------------------------------------------------- rows

    def rows(self) -> Iterator[Row]:
        """Give every current row, whatever its status, sorted by root, path and part."""
        for root in sorted(self._root_ids):
            yield from self._rows("root = ? ORDER BY path, part", [self._root_ids[root]])

    def rows_of(self, root: str, path: str) -> list[Row]:
        """Give the current rows of one item, by part; none if there is no such item."""
        number = self._root_ids.get(root)
        return [] if number is None else list(self._rows("root = ? AND path = ? ORDER BY part", [number, path]))

    def rows_in(self, wanted: Callable[[Key], bool]) -> Iterator[Row]:
        """Give the current rows in those folders, root and path, that are `wanted`, in no order."""
        numbers = [number for folder, number in self.folders.items() if wanted(folder)]
        if not numbers:
            return iter(())
        if len(numbers) == len(self.folders):
            return self._rows("TRUE", [])
        with self._lock:  # as many parameters as folders might be too many for one statement
            self.connection.execute("CREATE TEMP TABLE IF NOT EXISTS wanted(folder INTEGER PRIMARY KEY)")
            self.connection.execute("DELETE FROM wanted")
            self.connection.executemany("INSERT INTO wanted VALUES(?)", ((one,) for one in numbers))
        return iter(list(self._rows("folder IN (SELECT folder FROM wanted)", [])))

    def folder_rows(self, folder: Key) -> dict[Key, tuple[Row, bool]]:
        """Give the row that stands for each item in one folder, and whether the features of all its parts are there.

        Of several parts `item_row` says which that is.
        """
        number, root = self.folders.get(folder), self._root_ids.get(folder[0])
        if number is None or root is None:
            return {}
        query = f"SELECT {_COLUMNS}, {_HELD} FROM rows WHERE root = ? AND folder = ? "
        values: list[Any] = [root, number]
        if folder[1]:  # a range of the table; 0 comes behind /
            query += "AND path > ? AND path < ? "
            values += [f"{folder[1]}/", f"{folder[1]}0"]
        found: dict[Key, tuple[Row, bool]] = {}
        parts: dict[Key, list[tuple[Row, bool]]] = {}
        with garbage_collection_paused():
            for *columns, held in self._all(query + "ORDER BY path, part", values):
                row = self._row(columns)
                if row.is_part:
                    parts.setdefault(row.key, []).append((row, bool(held)))
                else:
                    found[row.key] = (row, bool(held))
        for key, some in parts.items():
            rows = [row for row, _ in some]
            found[key] = (item_row(rows), is_whole(rows) and all(held for _, held in some))
        return found

    def rows_with_status(self, status: str) -> Iterator[Row]:
        """Give the current rows of this status, sorted by root, path and part."""
        for root in sorted(self._root_ids):
            yield from self._rows("root = ? AND status = ? ORDER BY path, part", [self._root_ids[root], status])

    def rows_named(self, wanted: Callable[[str, str], bool]) -> list[Row]:
        """Give the current rows whose root and path are `wanted`, sorted by root, path and part.

        Every name is looked at, and only the rows that are wanted are read.
        """
        names = dict(self._roots)
        with self._lock:
            found = self.connection.execute("SELECT root, path FROM rows")
            keys = {(names[root], path) for root, path in found if wanted(names[root], path)}
        if len(keys) > _MANY:
            return [row for row in self.rows() if row.key in keys]
        return [row for key in sorted(keys) for row in self.rows_of(*key)]

    def names_containing(self, text: str, most: int) -> list[Key]:
        """Give root and path of the first `most` items with status ok whose path contains `text`, sorted by path.

        Upper and lower case of ASCII letters are the same. SQLite looks at the names, and no row is read: of a million
        that takes less than a second, and next to nothing where some are found early.
        """
        pattern = f"%{_WILDCARD.sub(_ESCAPED, text)}%"
        query = "SELECT root, path FROM rows WHERE status = 'ok' AND part = 0 AND path LIKE ? ESCAPE '!' LIMIT ?"
        return [(self._roots[root], path) for root, path in self._all(query, [pattern, most])]

    def rows_without_features(self) -> Iterator[Row]:
        """Give the current rows with status ok whose features are in no shard, in no order."""
        return self._rows(f"status = 'ok' AND NOT {_HELD}", [])

    def current_places(self, shard: int) -> dict[int, Key]:
        """Give the rows of a shard that are current: their numbers in it, and their items, one for each part."""
        found = self._all("SELECT row, root, path FROM rows WHERE shard = ?", [shard])
        return {row: (self._roots[root], path) for row, root, path in found}

    def _rows(self, condition: str, values: Iterable[Any]) -> Iterator[Row]:
        with self._lock:
            cursor = self.connection.execute(f"SELECT {_COLUMNS} FROM rows WHERE {condition}", tuple(values))
        while True:
            with self._lock:
                some = cursor.fetchmany(_ROWS_AT_A_TIME)
                with garbage_collection_paused():
                    rows = [self._row(one) for one in some]
            if not rows:
                return
            yield from rows

    def _row(self, values: Iterable[Any]) -> Row:
        """Make a row of what a query gave. StoreDamaged if no writer writes such a row: not this program made it."""
        found = list(values)
        found[_ROOT] = self._roots[found[_ROOT]]
        if found[_SHA256] is not None:
            found[_SHA256] = found[_SHA256].hex()
        for place in _SHORT:
            if found[place] is not None:
                found[place] = self._alike.setdefault(found[place], found[place])
        for place in _INTERNED:
            if found[place] is not None:
                found[place] = self._texts.get(found[place]) or self._text(found[place])
        if found[_GRID] is not None:
            found[_GRID] = self._grids.get(found[_GRID]) or self._grid(found[_GRID])
        found[_HAS_FEATURES] = bool(found[_HAS_FEATURES])
        row = Row(*found)
        wrong = unknown_value(row) or row_error(row, self._config)
        if wrong:
            raise self._damaged(f"{row.path} {wrong}")
        return row

    def _damaged(self, what: str) -> StoreDamaged:
        place = f"{self._where}/{layout.CATALOGUE}"
        return StoreDamaged(f"{place} is not what qvsplit wrote ({what}); remove that file")

    @cached_property
    def _config(self) -> ExtractionConfig:
        assert self.config is not None
        return self.config

    def _text(self, number: int) -> str:
        text = self._texts.get(number)
        if text is None:
            found = self.connection.execute("SELECT text FROM texts WHERE id = ?", (number,)).fetchone()
            if found is None:
                raise self._damaged(f"it has no text {number}")
            text = str(found[0])
            if len(self._texts) >= _MAX_TEXTS:
                self._texts.clear()
            self._texts[number] = text
        return text

    def _grid(self, number: int) -> tuple[int, int, int]:
        grid = self._grids.get(number)
        if grid is None:
            try:
                t, h, w = map(int, json.loads(self._text(number)))
            except (ValueError, TypeError):
                raise self._damaged("a grid is none") from None
            grid = self._grids[number] = (t, h, w)
        return grid

    # --------------------------------------------------------------------------------------------------- features

    def home(self, content: Content | None) -> Place | None:
        """Say which row of which shard holds the features of this content."""
        if content is None:
            return None
        query = "SELECT shard, row FROM contents WHERE sha256 = ? AND part = ?"
        found = self._one(query, _content(content))
        return None if found is None else (found[0], found[1])

    def home_places(self, sha256: str | None) -> list[Place]:
        """Give the rows that hold the features of all parts of a file's content, by part; none where one is missing.

        What a part is of its file stands in its row: so all are known, whatever has become of the items.
        """
        if sha256 is None:
            return []
        query = "SELECT part, shard, row, last FROM contents WHERE sha256 = ? ORDER BY part"
        places: list[Place] = []
        for part, shard, row, last in self._all(query, [bytes.fromhex(sha256)]):
            if part != len(places):
                break
            places.append((shard, row))
            if last:
                return places
        return []

    def homes(self, shard: int) -> set[int]:
        """Give the rows of a shard whose features are the ones that are used."""
        return {row for (row,) in self._all("SELECT row FROM contents WHERE shard = ?", [shard])}

    def rows_showing(self, content: Content) -> list[Row]:
        """Give the current rows with status ok of this content, by root and path.

        Made for whoever asks it of many contents: the first call sorts all rows by content.
        """
        with self._lock:
            if not self._sorted_by_content:
                self.connection.execute("CREATE TEMP TABLE shown(sha256, part, root, path)")
                self.connection.execute(
                    "INSERT INTO shown SELECT sha256, part, root, path FROM rows WHERE status = 'ok' ORDER BY sha256"
                )
                self.connection.execute("CREATE INDEX temp.shown_by_content ON shown(sha256)")
                self._sorted_by_content = True
        query = "SELECT root, path FROM shown WHERE sha256 = ? AND part = ?"
        keys = sorted((self._roots[root], path) for root, path in self._all(query, _content(content)))
        return [row for key in keys for row in self.rows_of(*key) if row.part == content[1]]

    # ---------------------------------------------------------------------------------------------------- counting

    def counts(self) -> dict[str, dict[str, int]]:
        """Count the items of each root by status."""
        found = self._all("SELECT root, status, sum(part = 0) FROM rows GROUP BY root, status")
        counts: dict[str, dict[str, int]] = {}
        for root, status, number in found:
            counts.setdefault(self._roots[root], {})[status] = number
        return dict(sorted(counts.items()))

    def item_counts(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Count the items by status and kind, and behind them their current rows.

        There are more rows than items where videos were cut into parts.
        """
        query = "SELECT status, kind, sum(part = 0), count(*) FROM rows GROUP BY status, kind"
        return {(status, kind): (items, rows) for status, kind, items, rows in self._all(query)}

    def warnings(self) -> dict[str, int]:
        """Count the current rows with status ok by what their `warnings` say; those without any are left out."""
        joined = "rows JOIN texts ON texts.id = rows.warnings"
        query = f"SELECT text, count(*) FROM {joined} WHERE status = 'ok' GROUP BY text ORDER BY text"
        return dict(self._all(query))

    def counts_by_folder(self) -> dict[Key, int]:
        """Count the current rows that are not deleted, by folder: of a video that was cut, its parts."""
        found = self._all("SELECT folder, count(*) FROM rows WHERE status != 'deleted' GROUP BY folder")
        names = {number: folder for folder, number in self.folders.items()}
        return {names[folder]: number for folder, number in found}

    @cached_property
    def ok(self) -> int:
        """How many current rows have status ok."""
        return int(self._all("SELECT count(*) FROM rows WHERE status = 'ok'")[0][0])

    def tokens(self) -> int:
        """Count the tokens of the current rows with status ok."""
        return int(self._all("SELECT coalesce(sum(n_tokens), 0) FROM rows WHERE status = 'ok'")[0][0])

    def video_seconds(self) -> float:
        """Add up the seconds of the videos with status ok, each once, however many parts it was cut into."""
        each = "SELECT max(duration) AS seconds FROM rows WHERE status = 'ok' AND kind = 'video' GROUP BY root, path"
        return float(self._all(f"SELECT total(seconds) FROM ({each})")[0][0])

    def copies(self) -> int:
        """Count the items with status ok whose features, the first part's, another row holds."""
        query = (
            "SELECT count(*) FROM rows JOIN contents ON contents.sha256 = rows.sha256 AND contents.part = rows.part "
            "WHERE status = 'ok' AND rows.part = 0 AND NOT has_features"
        )
        return int(self._all(query)[0][0])


def _content(content: Content) -> tuple[bytes, int]:
    return bytes.fromhex(content[0]), content[1]
