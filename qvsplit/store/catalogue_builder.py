"""Make a catalogue: from nothing or from an older one, shard by shard; what is current is decided here.

Current are all rows of an item with the highest generation. Of two rows of one part with the same generation, as a
compaction that was cut short leaves them, the one in the shard of the higher number counts; so it is with features of
the same content. The order in which shards are added makes no difference.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any

from qvsplit.store.catalogue import INTERNED, SCHEMA, VERSION, Catalogue, FolderTally
from qvsplit.store.row import ROW_FIELDS, Key, Row
from qvsplit.store.shard_reader import Shard
from qvsplit.store.storage import StoredFile

_CACHE_KIB = 64 << 10
_FIELDS = tuple(name for name in ROW_FIELDS if name != "root")
_NAMES = ["root", "folder", "shard", "row", *_FIELDS]
_fields_of = attrgetter(*_FIELDS)
_SHA256, _GRID = _NAMES.index("sha256"), _NAMES.index("grid_thw")
_INTERNED = tuple(map(_NAMES.index, INTERNED))
_PUT_ROW = f"""
INSERT INTO rows({", ".join(f'"{name}"' for name in _NAMES)}) VALUES({", ".join("?" * len(_NAMES))})
ON CONFLICT(root, path, part) DO UPDATE SET {", ".join(f'"{name}" = excluded."{name}"' for name in _NAMES)}
WHERE (excluded.generation, excluded.shard, excluded.row) >= (generation, shard, row)
"""
_PUT_CONTENT = """
INSERT INTO contents(sha256, part, shard, row, last) VALUES(?, ?, ?, ?, ?)
ON CONFLICT(sha256, part) DO UPDATE SET shard = excluded.shard, row = excluded.row, last = excluded.last
WHERE (excluded.shard, excluded.row) >= (shard, row)
"""
# an item that was one clip and is now several, or the other way round: parts of an older generation are no longer
_DROP_OLD_PARTS = """
DELETE FROM rows WHERE EXISTS (SELECT 1 FROM rows AS other WHERE other.root = rows.root AND other.path = rows.path
AND other.generation > rows.generation)
"""


class CatalogueBuilder:
    """A catalogue that is being made.

    Args:
        connection: An empty database, or a copy of an older catalogue.
        where: The store, for messages.

    Attributes:
        is_a_copy: Whether it began with an older catalogue.
    """

    def __init__(self, connection: sqlite3.Connection, where: str) -> None:
        self.connection = connection
        self._where = where
        # whoever reads opens the finished file: nothing has to be safe while it is being made
        for pragma in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_CACHE_KIB}"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("BEGIN")
        self.is_a_copy = bool(self._all("SELECT 1 FROM sqlite_schema LIMIT 1"))
        if not self.is_a_copy:
            for statement in SCHEMA.split(";"):
                connection.execute(statement)
            self._put_fact("version", VERSION)
        self._texts: dict[str, int] = {}
        self._roots: dict[str, int] = {name: number for number, name in self._all("SELECT id, name FROM roots")}
        self._folders: dict[Key, int] = {
            (root, path): number for number, root, path in self._all("SELECT id, root, path FROM folders")
        }

    def _all(self, query: str, values: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        return self.connection.execute(query, tuple(values)).fetchall()

    def _put_fact(self, name: str, value: Any) -> None:
        self.connection.execute("INSERT OR REPLACE INTO facts VALUES(?, ?)", (name, value))

    def _fact(self, name: str) -> int:
        found = self._all("SELECT value FROM facts WHERE name = ?", [name])
        return int(found[0][0]) if found else 0

    def add(self, number: int, file: StoredFile, shard: Shard) -> None:
        """Add all rows of a shard. Folders with rows in it have to be looked at again."""
        rows = shard.rows
        tokens = sum(row.n_tokens or 0 for row in rows if row.has_features)
        self.connection.execute(
            "INSERT INTO shards VALUES(?, ?, ?, ?, ?, ?, ?, ?)",
            (number, file.name, file.size, file.version, shard.checksum, self._schema(shard), len(rows), tokens),
        )
        self.connection.executemany(_PUT_ROW, self._values(number, rows))
        homes = (
            (bytes.fromhex(row.sha256), row.part, number, index, row.is_last)
            for index, row in enumerate(rows)
            if row.has_features and row.sha256 is not None
        )
        self.connection.executemany(_PUT_CONTENT, homes)
        if any(row.part for row in rows):
            self._put_fact("parts", 1)
        self._put_fact("generation", max(self._fact("generation"), max((row.generation for row in rows), default=0)))
        touched = ((self._folders[folder],) for folder in {row.folder for row in rows})
        self.connection.executemany("UPDATE folders SET digest = NULL WHERE id = ?", touched)

    def note_version(self, number: int, file: StoredFile) -> None:
        """Note the version of a shard that was copied or touched, and is the one that it was."""
        self.connection.execute(
            "UPDATE shards SET size = ?, version = ? WHERE number = ?",
            (file.size, file.version, number),
        )

    def remove(self, numbers: Collection[int]) -> bool:
        """Take out shards that no longer exist; False where their rows or features count, which needs all others."""
        for number in numbers:
            for table in ("rows", "contents"):
                if self._all(f"SELECT 1 FROM {table} WHERE shard = ? LIMIT 1", [number]):
                    return False
            self.connection.execute("DELETE FROM shards WHERE number = ?", (number,))
        return True

    def put_tallies(self, tallies: Mapping[Key, FolderTally], cures: Mapping[str, Any]) -> None:
        """Note in which folders nothing is left to do, in place of what was noted before, and what could be read."""
        self._drop_old_parts()
        self.connection.execute("UPDATE folders SET digest = NULL")
        self.connection.executemany(
            "UPDATE folders SET digest = ?, ok = ?, failed = ?, not_found = ?, excluded = ? WHERE id = ?",
            (
                (one.digest, one.ok, one.failed, one.not_found, one.excluded, self._folder(key))
                for key, one in tallies.items()
            ),
        )
        # where every row is of a deleted file there is nothing to look for
        self.connection.execute(
            "UPDATE folders SET digest = '', ok = 0, failed = 0, not_found = 0, excluded = 0 WHERE digest IS NULL "
            "AND id NOT IN (SELECT folder FROM rows WHERE status != 'deleted')"
        )
        self._put_fact("cures", json.dumps(cures, sort_keys=True))

    def finish(self) -> Catalogue:
        """Give the catalogue, whose connection is the builder's."""
        self._drop_old_parts()
        self.connection.execute("COMMIT")
        return Catalogue(self.connection, self._where)

    def _drop_old_parts(self) -> None:
        """Take out the rows of older generations that no row of the same part has taken the place of."""
        if self._fact("parts"):
            self.connection.execute(_DROP_OLD_PARTS)

    # ------------------------------------------------------------------------------------------------------ values

    def _values(self, shard: int, rows: Iterable[Row]) -> Iterator[list[Any]]:
        for index, row in enumerate(rows):
            values = [self._root(row.root), self._folder(row.folder), shard, index, *_fields_of(row)]
            if row.sha256 is not None:
                values[_SHA256] = bytes.fromhex(row.sha256)
            if row.grid_thw is not None:
                values[_GRID] = json.dumps(row.grid_thw)
            for place in _INTERNED:
                if values[place] is not None:
                    values[place] = self._texts.get(values[place]) or self._text(values[place])
            yield values

    def _schema(self, shard: Shard) -> int:
        content = json.dumps(shard.schema.to_json(), sort_keys=True)
        return self._number_of("schemas", "content", content)

    def _root(self, name: str) -> int:
        number = self._roots.get(name)
        if number is None:
            number = self._roots[name] = self._number_of("roots", "name", name)
        return number

    def _folder(self, folder: Key) -> int:
        number = self._folders.get(folder)
        if number is None:
            added = self.connection.execute("INSERT INTO folders(root, path) VALUES(?, ?)", folder)
            number = self._folders[folder] = int(added.lastrowid or 0)
        return number

    def _text(self, text: str) -> int:
        if text not in self._texts:
            if len(self._texts) >= 1 << 17:
                self._texts.clear()
            self._texts[text] = self._number_of("texts", "text", text)
        return self._texts[text]

    def _number_of(self, table: str, column: str, value: str) -> int:
        found = self._all(f"SELECT id FROM {table} WHERE {column} = ?", [value])
        if found:
            return int(found[0][0])
        added = self.connection.execute(f"INSERT INTO {table}({column}) VALUES(?)", (value,))
        return int(added.lastrowid or 0)
