"""Write one shard, which appears under its name whole or not at all.

Nothing is written unless tokens, grid and byte lengths of a row belong together and every value is finite.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from qvsplit.runtime.atomic_files import disk_errors
from qvsplit.store import codec
from qvsplit.store.features import Features, TensorSpec
from qvsplit.store.footer import insert_checksum
from qvsplit.store.row import Row, row_error
from qvsplit.store.schema import DICTIONARY_COLUMNS, ShardSchema, arrow_schema, row_columns
from qvsplit.store.storage import Writable

if TYPE_CHECKING:
    import pyarrow as pa

ROW_GROUP_BYTES = 4 << 20  # of raw features: reading one item reads about this much
ROW_GROUP_ROWS = 256
ZSTD_LEVEL = 1
UNSYNCED_BYTES = 32 << 20  # written and not yet on the disk: a signal must not have to wait for much more
MAX_VALUE_BYTES = 1 << 31  # a Parquet value ends there
MAX_ROW_BYTES = 15 << 28  # of all tensors: with the columns of text less than a reader takes of a row group


def size_error(n_tokens: int, tensors: tuple[TensorSpec, ...]) -> str | None:
    """Say why no row holds the features of so many tokens; None if one does."""
    for spec in tensors:
        if (length := n_tokens * spec.token_bytes) >= MAX_VALUE_BYTES:
            return f"has {length} bytes of {spec.key}, and a value of a shard ends at 2 GiB"
    if (length := n_tokens * sum(spec.token_bytes for spec in tensors)) >= MAX_ROW_BYTES:
        return f"has {length} bytes of features, and a row of a shard ends at 3.75 GiB"
    return None


def check_features(row: Row, lengths: Mapping[str, int], tensors: tuple[TensorSpec, ...]) -> None:
    """ValueError unless tokens and byte lengths (by column) of a row with features belong together."""
    if row.n_tokens is None:
        raise ValueError("has features but no number of tokens")
    for spec in tensors:
        length, expected = lengths.get(spec.column, 0), row.n_tokens * spec.token_bytes
        if length != expected:
            raise ValueError(f"has {length} bytes of {spec.key} instead of {expected}")
    if wrong := size_error(row.n_tokens, tensors):
        raise ValueError(wrong)


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row as a shard takes it: its features as bytes, by column; none where it has none of its own."""

    row: Row
    blobs: Mapping[str, bytes | memoryview]

    @property
    def bytes(self) -> int:
        """Bytes of features before compression."""
        return sum(map(len, self.blobs.values()))


def encoded(row: Row, features: Features | None, schema: ShardSchema) -> EncodedRow:
    """Check a row, and encode its features if it `has_features`.

    Raises:
        ValueError: Row and features do not belong together, or a value is not finite: a mistake of the caller's, or of
            an encoder's.
    """
    if row.has_features != (features is not None):
        raise ValueError("says it has features, and is given none" if features is None else "is given features")
    if wrong := row_error(row, schema.config):
        raise ValueError(wrong)
    if features is None:
        return EncodedRow(row, {})
    specs = schema.tensors
    if set(features.tensors) != {spec.key for spec in specs}:
        raise ValueError(f"has the tensors {', '.join(features.tensors)}, and its shard declares others")
    check_features(row, {spec.column: features.tensors[spec.key].raw.nbytes for spec in specs}, specs)
    return EncodedRow(
        row, {spec.column: codec.encode(features.tensors[spec.key].raw, spec.dtype) for spec in specs}
    )  # fmt: skip


class ShardWriter:
    """One shard that is being written.

    Rows go to a hidden staged file as they come; `finish` inserts the footer checksum, syncs the file and renames it.
    Until then the shard does not exist.

    Attributes:
        rows: Rows so far.
        bytes: Bytes of features so far, before compression.
    """

    def __init__(self, storage: Writable, name: str, schema: ShardSchema) -> None:
        import pyarrow.parquet as pq

        self.schema = schema
        self.rows = 0
        self.bytes = 0
        self._storage = storage
        self._arrow = arrow_schema(schema)
        self._group: list[EncodedRow] = []
        self._group_bytes = 0
        self._synced = 0
        self._whole = ExitStack()
        self._stream: IO[bytes] = self._whole.enter_context(storage.put_whole(name))
        try:
            with disk_errors(storage.location):
                self._parquet = pq.ParquetWriter(
                    self._stream,
                    self._arrow,
                    compression="zstd",
                    compression_level=ZSTD_LEVEL,
                    use_dictionary=list(DICTIONARY_COLUMNS),
                    write_statistics=["path", "status", "generation"],
                    write_page_checksum=True,
                )
        except BaseException as error:
            self._give_up(error)
            raise

    def add(self, row: Row, features: Features | None) -> None:
        """Add one row, with its features if it `has_features`. ValueError as `encoded` says."""
        self.add_encoded(encoded(row, features, self.schema))

    def add_encoded(self, one: EncodedRow) -> None:
        """Add one row that was encoded for a shard of this schema."""
        self._group.append(one)
        self._group_bytes += one.bytes
        self.bytes += one.bytes
        self.rows += 1
        if self._group_bytes >= ROW_GROUP_BYTES or len(self._group) >= ROW_GROUP_ROWS:
            self._flush()

    def finish(self) -> int:
        """Make the shard appear; gives its size in bytes. Where that fails nothing is left behind."""
        try:
            with disk_errors(self._storage.location):
                self._flush()
                self._parquet.close()
                size = insert_checksum(self._stream)
            self._whole.close()
        except BaseException as error:
            self._give_up(error)
            raise
        return size

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._give_up(_Abandoned())

    def _give_up(self, reason: BaseException) -> None:
        """Leave the staged file's block with an error, so that it does not appear."""
        with suppress(Exception):  # it may be mid-write on a full disk: closing must not hide why we are here
            self._parquet.close()
        self._whole.__exit__(type(reason), reason, None)

    def _flush(self) -> None:
        if not self._group:
            return
        table = self._table()
        self._group, self._group_bytes = [], 0  # the table has copies
        with disk_errors(self._storage.location):
            self._parquet.write_table(table, row_group_size=ROW_GROUP_ROWS)
            if self._stream.tell() - self._synced >= UNSYNCED_BYTES:
                self._stream.flush()
                os.fsync(self._stream.fileno())
                self._synced = self._stream.tell()

    def _table(self) -> pa.Table:
        """Give the rows of the group in hand."""
        import pyarrow as pa

        names = list(row_columns())
        columns = {
            name: pa.array([getattr(one.row, name) for one in self._group], self._arrow.field(name).type)
            for name in names
        }
        columns |= {
            spec.column: _binary([one.blobs.get(spec.column) for one in self._group]) for spec in self.schema.tensors
        }
        return pa.table(columns, schema=self._arrow)


def _binary(values: list[bytes | memoryview | None]) -> pa.Array:
    """Give a column of bytes; of a single value, which may be large, without a copy."""
    import pyarrow as pa

    if len(values) > 1 or values[0] is None:
        return pa.array([None if value is None else bytes(value) for value in values], pa.large_binary())
    ends = pa.array([0, len(values[0])], pa.int64())
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, ends.buffers()[1], pa.py_buffer(values[0])])


class _Abandoned(Exception):
    """`abandon` was called."""
