"""Read one finished shard, checked: rows at once, features one by one, on demand.

Nothing read is handed on unless the footer's checksum matches, the row is one that a writer writes, and tokens, lengths
and values of its features are sound. No memory is given for what a file merely claims (parquet_guard.py). The file is
open only while something is read from it: a store may have more shards than a process may have open files.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvsplit.errors import OutOfMemory, ShardDamaged, ShardNotFound, StoreDamaged
from qvsplit.runtime.memory import garbage_collection_paused
from qvsplit.store import codec
from qvsplit.store.config import ExtractionConfig, Provenance, made_by_newer
from qvsplit.store.features import Features, StoredTensor, TensorSpec, containers_of
from qvsplit.store.footer import NotAShard, read_footer
from qvsplit.store.parquet_guard import Chunk, chunks, pages
from qvsplit.store.row import ROW_FIELDS, Row, row_error, unknown_value
from qvsplit.store.schema import METADATA_KEY, ShardSchema, check_columns, read_metadata, row_columns
from qvsplit.store.shard_writer import check_features
from qvsplit.store.storage import LocalStorage, Storage

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

# Of what a reader believes: one image at the model's own limit is 0.5 GB
MAX_GROUP_ROWS = 1 << 16
MAX_GROUP_BYTES = 1 << 32
MAX_TEXT_BYTES = 1 << 28  # of all columns but those of features
PAGE_SLACK = 1 << 16  # levels, lengths
GROUPS_AT_A_TIME = 64  # row groups whose rows are read together
ADVICE = "run `qvsplit extract` again: it quarantines the file and encodes the items in it again"
SHARED_STRINGS = ("root", "kind", "status", "error_kind", "placeholder", "inputs", "media", "warnings")


def read_checksum(storage: Storage, name: str) -> bytes:
    """Give SHA-256 of a shard's footer, held against the footer. Raises as `read_footer`, and OSError."""
    with storage.open(name) as stream:
        return hashlib.sha256(read_footer(stream)).digest()


def sound_checksum(storage: Storage, name: str) -> bytes | None:
    """Give SHA-256 of a shard's footer; None where it cannot be read or is not sound, as opening it will say."""
    try:
        return read_checksum(storage, name)
    except (OSError, ValueError):
        return None


class Shard:
    """A finished shard.

    Args:
        storage: Where it lies.
        name: Its name there.
        keeps_features: Keep the features of the row group that was read last in memory, for whoever reads row by row.

    Attributes:
        name: Its name in the storage.
        schema: What it declares.
        checksum: SHA-256 of its footer, which names its content.

    Raises:
        StoreDamaged: It cannot be read.
        ShardDamaged: It is not what a writer wrote; the message names file, row and column.
        ConfigError: A newer version wrote it.
    """

    def __init__(self, storage: Storage, name: str, *, keeps_features: bool = False) -> None:
        self.storage = storage
        self.name = name
        self._metadata: Any = None  # pyarrow's FileMetaData
        self._chunks: list[list[Chunk]] = []
        self._group_starts: list[int] = []
        self._group_rows: tuple[int, list[Row]] = (-1, [])  # of the row group that was read last
        self._keeps_features = keeps_features
        self._group_blobs: tuple[int, dict[str, Any]] = (-1, {})  # of the row group that was read last
        self.schema = self._read_footer()

    @cached_property
    def rows(self) -> list[Row]:
        """Its rows, in order."""
        return self._read_rows(range(len(self._group_starts)))

    def __len__(self) -> int:
        """Count its rows."""
        return int(self._metadata.num_rows)

    @property
    def where(self) -> str:
        """The place of the file, for messages."""
        return self.storage.where(self.name)

    @property
    def path(self) -> Path:
        """The file, in a local store."""
        return Path(self.where)

    @property
    def config(self) -> ExtractionConfig:
        """The extraction config of all its rows."""
        return self.schema.config

    @property
    def provenance(self) -> Provenance:
        """Where its newest rows came from."""
        return self.schema.provenance[-1]

    def row(self, index: int) -> Row:
        """Give row `index`; only the rows of its row group are read."""
        group = self._group_of(index)
        return self._rows_of(group)[index - self._group_starts[group]]

    def features(self, index: int, names: Collection[str] | None = None) -> Features:
        """Give the features of row `index`, checked; with `names` only those tensors, and only their columns are read.

        Raises:
            KeyError: No tensor has such a name.
        """
        row = self.row(index)
        group = self._group_of(index)
        specs = self._specs(names)
        kept = self._group_blobs[1] if self._group_blobs[0] == group else {}
        with self._damage(f"features of row {index} ({row.path})"):
            columns = kept | self._blobs(group, [spec for spec in specs if spec.column not in kept])
            place = index - self._group_starts[group]
            blobs = {spec.column: columns[spec.column][place].as_buffer() for spec in specs}
        if self._keeps_features:
            self._group_blobs = (group, columns)
        return self._checked(row, index, blobs, specs)

    def _specs(self, names: Collection[str] | None) -> tuple[TensorSpec, ...]:
        """Give what is declared of the tensors of these names, in order; of all if there are no names."""
        if names is None:
            return self.schema.tensors
        if unknown := set(names) - {spec.key for spec in self.schema.tensors}:
            raise KeyError(f"no tensor {min(unknown)!r}")
        return tuple(spec for spec in self.schema.tensors if spec.key in names)

    def __iter__(self) -> Iterator[tuple[int, Row, Features | None]]:
        """Iterate over all rows with their features; each row group is read once."""
        for group, start in enumerate(self._group_starts):
            rows = self._rows_of(group)
            with self._damage(f"features, row group {group}"):
                columns = self._blobs(group, self.schema.tensors)
            for offset, row in enumerate(rows):
                index = start + offset
                blobs = {name: column[offset].as_buffer() for name, column in columns.items()}
                if any(row.has_features != (blob is not None) for blob in blobs.values()):
                    raise self._damaged(
                        f"row {index} ({row.path}): has_features is {row.has_features}, its features say otherwise"
                    )
                yield index, row, self._checked(row, index, blobs, self.schema.tensors) if row.has_features else None

    # ------------------------------------------------------------------------------------------------- the file

    def _read_footer(self) -> ShardSchema:
        with self._damage("its footer"):
            with self.storage.open(self.name) as stream:
                footer = read_footer(stream)
            self.checksum = hashlib.sha256(footer).digest()
            self._chunks = chunks(footer)
            with self._open() as parquet:
                self._metadata = parquet.metadata
                columns = parquet.schema_arrow
        schema = self._read_schema(columns)
        self._group_starts = self._check_groups()
        return schema

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        """Open the file for pyarrow, which reads it through Python, and so in the calling thread only.

        A thread of its own that lets go of a Python object while the interpreter ends takes the process down with it.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        with (
            self.storage.open(self.name) as stream,
            pa.PythonFile(stream, mode="r") as file,
            pq.ParquetFile(file, metadata=self._metadata, page_checksum_verification=True, pre_buffer=False) as parquet,
        ):
            yield parquet

    def _read_schema(self, columns: pa.Schema) -> ShardSchema:
        text = (self._metadata.metadata or {}).get(METADATA_KEY)
        if text is None:
            raise self._damaged("it is a Parquet file, but not one that qvsplit wrote")
        try:
            schema = read_metadata(text, self.where)
            check_columns(columns, schema, self.where)
        except StoreDamaged as error:
            raise ShardDamaged(str(error), self.where, "its metadata are not usable") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise self._damaged(str(error) or "its metadata are not usable") from None
        return schema

    def _check_groups(self) -> list[int]:
        """Give the first row of each row group. Refuses claims beyond any writer's before memory is given for them."""
        described = [self._metadata.row_group(group) for group in range(self._metadata.num_row_groups)]
        sizes = [group.num_rows for group in described]
        if any(size < 1 for size in sizes) or sum(sizes) != self._metadata.num_rows:
            raise self._damaged("its row counts contradict each other")
        if any(size > MAX_GROUP_ROWS for size in sizes) or any(g.total_byte_size > MAX_GROUP_BYTES for g in described):
            raise self._damaged("one of its row groups claims more than any writer puts there")
        return [0, *accumulate(sizes[:-1])] if sizes else []

    def _check_pages(self, groups: Sequence[int], names: Collection[str], room: int) -> None:
        """ValueError if decoding these columns might take more than `room` bytes, whatever the footer says."""
        most = max(room, MAX_TEXT_BYTES)  # of what a dictionary might be repeated to
        wanted = [
            (self._metadata.row_group(group).num_rows, column)
            for group in groups
            for column in self._chunks[group]
            if column.column in names
        ]
        with self.storage.open(self.name) as stream:
            for rows, column in wanted:
                values = 0
                for page in pages(stream, column.start, column.length):
                    values += page.values
                    room -= page.size
                    most -= page.size * rows if page.repeats else 0
                    if room < 0 or most < 0:
                        raise ValueError("more than its rows can need")
                if values > rows * (3 if column.column == "grid_thw" else 1):
                    raise ValueError("more values than its rows can have")

    # ------------------------------------------------------------------------------------------------- the rows

    def _group_of(self, index: int) -> int:
        """Give the number of the row group of row `index`. ShardDamaged if there is no such row."""
        if not 0 <= index < len(self):
            raise self._damaged(f"it has no row {index}")
        return bisect_right(self._group_starts, index) - 1

    def _rows_of(self, group: int) -> list[Row]:
        """Give the rows of one row group; those read last are kept."""
        if "rows" in self.__dict__:
            start = self._group_starts[group]
            return self.rows[start : start + self._metadata.row_group(group).num_rows]
        if self._group_rows[0] != group:
            self._group_rows = (group, self._read_rows([group]))
        return self._group_rows[1]

    def _read_rows(self, groups: Sequence[int]) -> list[Row]:
        columns = self._read_columns(groups)
        with garbage_collection_paused():
            return self._as_rows(columns, self._group_starts[groups[0]] if groups else 0)

    def _read_columns(self, groups: Sequence[int]) -> dict[str, list[Any]]:
        names = list(row_columns())
        columns: dict[str, list[Any]] = {name: [] for name in names}
        with self._damage("a column of its rows"):
            room = MAX_TEXT_BYTES
            with self._open() as parquet:
                for start in range(0, len(groups), GROUPS_AT_A_TIME):
                    some = list(groups[start : start + GROUPS_AT_A_TIME])
                    self._check_pages(some, names, MAX_TEXT_BYTES)
                    table = parquet.read_row_groups(some, columns=names, use_threads=False)
                    room -= table.nbytes
                    if room < 0:
                        raise ValueError("more text than any writer puts there")
                    for name in names:
                        columns[name] += _listed(table.column(name))
            expected = sum(self._metadata.row_group(group).num_rows for group in groups)
            if any(len(column) != expected for column in columns.values()):
                raise ValueError("fewer values than rows")
        return columns

    def _as_rows(self, columns: Mapping[str, Sequence[Any]], first: int) -> list[Row]:
        alike: dict[str, str] = {}  # one string for what most rows have in common
        ordered = [
            [None if value is None else alike.setdefault(value, value) for value in columns[name]]
            if name in SHARED_STRINGS
            else columns[name]
            for name in ROW_FIELDS
        ]
        grid = ROW_FIELDS.index("grid_thw")
        ordered[grid] = [None if value is None else tuple(value) for value in ordered[grid]]
        rows = [Row(*values) for values in zip(*ordered, strict=True)]
        for index, row in enumerate(rows, first):
            if unknown := unknown_value(row):
                raise made_by_newer(self.where, f"row {index} has the unknown {unknown}")
            if wrong := row_error(row, self.schema.config):
                raise self._damaged(f"row {index} ({row.path}) {wrong}")
        return rows

    # --------------------------------------------------------------------------------------------- the features

    def _blobs(self, group: int, specs: Sequence[TensorSpec]) -> dict[str, Any]:
        """Read the columns of these tensors of one row group.

        A damaged page header can make a reader give fewer values without an error: they are counted.
        """
        count = self._metadata.row_group(group).num_rows
        tokens = sum(row.n_tokens or 0 for row in self._rows_of(group) if row.has_features)
        found = {}
        for spec in specs:
            self._check_pages([group], [spec.column], tokens * spec.token_bytes + 16 * count + PAGE_SLACK)
            with self._open() as parquet:
                parts = parquet.read_row_group(group, columns=[spec.column], use_threads=False).column(0)
            column = parts.chunk(0) if parts.num_chunks == 1 else parts.combine_chunks()  # which copies
            if len(column) != count:
                raise ValueError("fewer values than rows")
            found[spec.column] = column
        return found

    def _checked(self, row: Row, index: int, blobs: dict[str, Any], specs: tuple[TensorSpec, ...]) -> Features:
        if not row.has_features:
            raise StoreDamaged(f"{self.where}: row {index} ({row.path}) holds no features of its own")
        try:
            if any(blob is None for blob in blobs.values()):
                raise ValueError("has features, and a column without them")
            check_features(row, {name: blob.size for name, blob in blobs.items()}, specs)
            tensors = {spec.key: self._tensor(spec, row, blobs[spec.column]) for spec in specs}
            self._check_shapes(row)
            return Features(
                self.config, tensors, row.grid_thw, row.placeholder_runs, row.inputs_by_name,
                {name: shape for name, shape in row.shapes.items() if name in tensors},
                containers_of(specs, self.config, row.kind),
                tuple(spec.key for spec in self.schema.tensors if spec not in specs), row.kind,
            )  # fmt: skip
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"row {index} ({row.path}) {error}") from None

    def _check_shapes(self, row: Row) -> None:
        """ValueError where a shape is not that of a tensor of this row, read or not."""
        sizes = {spec.key: (row.n_tokens or 0) * spec.width for spec in self.schema.tensors}
        if any(math.prod(shape) != sizes.get(name) for name, shape in row.shapes.items()):
            raise ValueError("has a shape that its features do not have")

    def _tensor(self, spec: TensorSpec, row: Row, blob: Any) -> StoredTensor:
        assert row.n_tokens is not None  # check_features has seen to it
        return StoredTensor(codec.decode(memoryview(blob), spec.dtype, row.n_tokens), spec.dtype)

    # ------------------------------------------------------------------------------------------------- damage

    def _damaged(self, what: str) -> ShardDamaged:
        return ShardDamaged(f"{self.where} is damaged: {what}; {ADVICE}", self.where, what)

    @contextmanager
    def _damage(self, what: str) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except FileNotFoundError:
            raise ShardNotFound(
                f"{self.where} no longer exists; run `qvsplit extract` again to make it again"
            ) from None
        except NotAShard as error:
            what = f"not a qvsplit shard: {error}"
            raise ShardDamaged(f"{self.where} is {what}", self.where, what) from None
        except MemoryError:
            raise OutOfMemory(f"{self.where} cannot be read: not enough memory") from None
        except OSError as error:
            if error.errno is not None:  # the system's word, not pyarrow's on what it read
                raise StoreDamaged(f"{self.where} cannot be read ({error.strerror})") from None
            raise self._damaged(f"{what}: {error}") from None
        except (ValueError, pa.ArrowException) as error:
            raise self._damaged(f"{what}: {error}") from None


def _listed(column: pa.ChunkedArray) -> list[Any]:
    """Give a column's values; most columns of most shards have none."""
    return [None] * len(column) if column.null_count == len(column) else list(column.to_pylist())


def open_shard(path: Path) -> Shard:
    """Open the shard in this file, by whatever name."""
    return Shard(LocalStorage(path.parent), path.name)
