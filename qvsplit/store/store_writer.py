"""The only place that appends to a store: rollover, duplicates by content, shards that appear whole.

Rows and features may come in any order, the store is the same: the same current rows, and the same features by content
identity. extract, compact, rebuild, repair and purge write through it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from qvsplit.errors import DiskError
from qvsplit.runtime.clock import active_seconds
from qvsplit.store import layout
from qvsplit.store.features import Features
from qvsplit.store.row import Content, Row
from qvsplit.store.schema import ShardSchema
from qvsplit.store.shard_writer import ShardWriter
from qvsplit.store.shards import next_number
from qvsplit.store.storage import Storage

# A shard ends at the first of these
SHARD_BYTES = 256 << 20
SHARD_ROWS = 10_000
SHARD_SECONDS = 300.0  # bounds what a killed run loses on a slow machine


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


class StoreWriter:
    """Appends rows with their features, in shards behind all others.

    Args:
        storage: The store, locked by the caller.
        schema: What every shard declares.
        is_held: Whether other shards hold the features of a content, and go on holding them.
        first: The lowest number that a shard may have.
        on_begin: Called before a shard is begun.
    """

    def __init__(
        self,
        storage: Storage,
        schema: ShardSchema,
        *,
        is_held: Callable[[Content], bool] = lambda content: False,
        first: int = 1,
        on_begin: Callable[[], None] = lambda: None,
    ) -> None:
        self.storage = storage
        self.schema = schema
        self.written = Written()
        self._is_held = is_held
        self._finished: set[Content] = set()  # held by shards of this writer's
        self._in_hand: set[Content] = set()  # held by the shard that is being written
        self._first = first
        self._on_begin = on_begin
        self._shard: ShardWriter | None = None
        self._began = 0.0

    def append(self, row: Row, features: Features | None = None) -> Row:
        """Append a row; gives it as it was written.

        Features that the store holds already, by content identity, are not written again.

        Raises:
            ValueError: Row and features do not belong together, or a value is not finite.
            DiskError: The shard in hand cannot be written; it is given up, finished ones are kept.
        """
        new = features is not None and row.content is not None and not self.holds(row.content)
        row = replace(row, has_features=new)
        if self._shard is None:
            self._on_begin()
            number = max(self._first, next_number(self.storage))
            self._shard = ShardWriter(self.storage, layout.shard_name(number), self.schema)
            self._began = active_seconds()
        try:
            self._shard.add(row, features if new else None)
        except DiskError:
            self.abandon()
            raise
        self.written.rows += 1
        if new and row.content is not None:
            self._in_hand.add(row.content)
        self._end_if_full(self._shard)
        return row

    def holds(self, content: Content) -> bool:
        """Say whether the store, or the shard in hand, holds the features of this content."""
        return content in self._in_hand or content in self._finished or self._is_held(content)

    def end_shard(self) -> None:
        """Finish the shard in hand, if there is one: from here on its rows survive."""
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

    def _end_if_full(self, shard: ShardWriter) -> None:
        full = shard.bytes >= SHARD_BYTES or shard.rows >= SHARD_ROWS
        if full or active_seconds() - self._began > SHARD_SECONDS:
            self.end_shard()
