"""What appends to a store: rollover, duplicates by content, whole shards. Of a cluster's shards, see `staging.py`.

All rows of an item are in one shard: a reader never finds some parts of a video without the others. Items may come in
any order, the store is the same: the same current rows, and the same features by content identity. extract, compact,
rebuild, repair and purge write through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace

from qvsplit.errors import DiskError
from qvsplit.runtime.clock import active_seconds
from qvsplit.runtime.interrupts import held_back
from qvsplit.store import layout
from qvsplit.store.features import Features
from qvsplit.store.row import Content, Row, is_whole
from qvsplit.store.schema import ShardSchema
from qvsplit.store.shard_writer import EncodedRow, ShardWriter, encoded
from qvsplit.store.shards import ShardNumbers
from qvsplit.store.storage import Storage

# A shard ends at the first of these
SHARD_BYTES = 256 << 20
SHARD_ROWS = 10_000
SHARD_SECONDS = 300.0  # bounds what a killed run loses on a slow machine
# Of an item's features that are kept in memory until all its parts are there; a larger item gets a shard of its own
ITEM_BYTES = 32 << 20

Part = tuple[Row, Features | None]


@dataclass
class Written:
    """What a writer has written so far.

    Attributes:
        shards: Finished shards.
        bytes: Their size on disk.
        rows: Rows appended, also those of the shard in hand.
    """

    shards: int = 0
    bytes: int = 0
    rows: int = 0


def is_full(size: int, rows: int, began: float, most_bytes: int | None = None) -> bool:
    """Say whether a shard ends here.

    Args:
        size: Bytes of its features so far, before compression.
        rows: Its rows so far.
        began: When it was begun, by `active_seconds`.
        most_bytes: A bound below that of every shard.
    """
    most = SHARD_BYTES if most_bytes is None else min(SHARD_BYTES, most_bytes)
    return size >= most or rows >= SHARD_ROWS or active_seconds() - began > SHARD_SECONDS


class StoreWriter:
    """Appends rows with their features, in shards behind all others.

    Args:
        storage: The store, locked by the caller.
        schema: What every shard declares.
        is_held: Whether other shards hold the features of a content, and go on holding them.
        numbers: Gives each shard its number.
        on_begin: Called before a shard is begun.
    """

    def __init__(
        self,
        storage: Storage,
        schema: ShardSchema,
        *,
        is_held: Callable[[Content], bool] = lambda content: False,
        numbers: ShardNumbers | None = None,
        on_begin: Callable[[], None] = lambda: None,
    ) -> None:
        self.storage = storage
        self.schema = schema
        self.written = Written()
        self._is_held = is_held
        self._finished: set[Content] = set()  # held by shards of this writer's
        self._in_hand: set[Content] = set()  # held by the shard that is being written
        self._numbers = ShardNumbers(storage) if numbers is None else numbers
        self._on_begin = on_begin
        self._shard: ShardWriter | None = None
        self._in_item = False  # parts of an item are being appended
        self._is_own = False  # and the shard in hand has no others
        self._began = 0.0

    def append(self, row: Row, features: Features | None = None) -> Row:
        """Append the row of an item that has one; gives it as it was written. See `append_item`."""
        return self.append_item([(row, features)])[0]

    def append_item(self, parts: Iterable[Part], *, as_found: bool = False) -> list[Row]:
        """Append all rows of one item, by part, with their features; gives them as they were written.

        Features that the store holds already, by content identity, are not written again.

        Args:
            parts: The rows with their features, taken one by one: a long video need not be in memory at once. Whatever
                is raised while they are taken, nothing of the item is written, and nothing else is lost.
            as_found: They were found in a store, and stay as they are should another writer have left a part out.

        Raises:
            ValueError: They are not all parts of one item, row and features do not belong together, or a value is not
                finite.
            DiskError: The shard in hand cannot be written; it is given up, finished ones are kept.
        """
        if self._in_item:
            raise RuntimeError("parts of an item are being appended, and nothing else may come between them")
        self._in_item = True
        try:
            return self._append_all(parts, as_found=as_found)
        except BaseException as error:
            if self._is_own or isinstance(error, DiskError):
                self.abandon()
            raise
        finally:
            self._in_item = self._is_own = False

    def _append_all(self, parts: Iterable[Part], *, as_found: bool) -> list[Row]:
        rows: list[Row] = []
        waiting: list[EncodedRow] = []
        waiting_bytes = 0
        for row, features in parts:
            new = features is not None and row.content is not None and not self.holds(row.content)
            row = replace(row, has_features=new)
            waiting.append(encoded(row, features if new else None, self.schema))
            waiting_bytes += waiting[-1].bytes
            rows.append(row)
            if (row.key, row.generation, row.sha256) != (rows[0].key, rows[0].generation, rows[0].sha256):
                raise ValueError(f"is no part of {rows[0].path}")
            if waiting_bytes >= ITEM_BYTES and not row.is_last:
                self._begin_own()
                self._add(waiting)
                waiting, waiting_bytes = [], 0
        features = None  # written from here on by what was made of them
        if not rows or not (as_found or rows[0].status == "deleted" or is_whole(rows)):
            raise ValueError("is not followed by all its parts: from 0 on, the last to the end of the video")
        with held_back() if len(rows) > 1 else nullcontext():  # all parts, or none
            self._add(waiting)
            self._in_hand |= {row.content for row in rows if row.has_features and row.content is not None}
            self.written.rows += len(rows)
            self._is_own = False
        self._end_if_full()
        return rows

    def _begin_own(self) -> None:
        """Let a large item have a shard of its own, in which nothing else is lost should it not come to its end."""
        if not self._is_own:
            self._end_shard()
            self._is_own = True

    def _add(self, rows: Iterable[EncodedRow]) -> None:
        """Add rows to the shard in hand, which is begun if need be."""
        if self._shard is None:
            self._on_begin()
            self._shard = ShardWriter(self.storage, layout.shard_name(self._numbers.take()), self.schema)
            self._began = active_seconds()
        for row in rows:
            self._shard.add_encoded(row)

    def holds(self, content: Content) -> bool:
        """Say whether the store, or the shard in hand, holds the features of this content."""
        return content in self._in_hand or content in self._finished or self._is_held(content)

    def end_shard(self) -> None:
        """Finish the shard in hand, if there is one: from here on its rows survive."""
        if self._in_item:
            raise RuntimeError("a shard does not end between the parts of an item")
        self._end_shard()

    def _end_shard(self) -> None:
        if self._shard is not None:
            shard, self._shard = self._shard, None
            contents, self._in_hand = self._in_hand, set()
            self.written.bytes += shard.finish()
            self.written.shards += 1
            self._finished |= contents

    def abandon(self) -> None:
        """Give up the shard in hand; finished ones are kept."""
        if self._shard is not None:
            shard, self._shard = self._shard, None
            self._in_hand.clear()
            shard.abandon()

    def _end_if_full(self) -> None:
        shard = self._shard
        if shard is not None and is_full(shard.bytes, shard.rows, self._began):
            self._end_shard()
