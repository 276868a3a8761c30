"""The shard: one Parquet file of rows. Codec, atomic writer, checked reader. The contract is docs/format.md.

`embeds` holds n_tokens × hidden_size values, C order, as byte planes: all bytes of the highest significance first.
Nothing is written, and nothing read is handed on, unless n_tokens == t·h·w / merge², the byte length fits, every
value is finite and the recipe is known. Knows nothing of models; needs no torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qvsplit.errors import AlbumDamaged, DiskError, QvsplitError, ShardDamaged
from qvsplit.pages import Chunk, chunks, pages
from qvsplit.recipe import DTYPE_BYTES, SCALE_BYTES, Made, Recipe, token_bytes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    import pyarrow.parquet as pq

METADATA_KEY = b"qvsplit"
MAGIC = b"PAR1"
# Parquet checks its pages, not its footer. 40 bytes before the footer, which no reader looks at, seal it.
SEAL_MAGIC = b"QVSEAL01"
SEAL_BYTES = len(SEAL_MAGIC) + 32
ROW_GROUP_BYTES = 4 << 20  # of raw embeddings: reading one picture reads about this much
ROW_GROUP_ROWS = 256
ZSTD_LEVEL = 1
# A shard ends at the first of these
SHARD_BYTES = 256 << 20
SHARD_ROWS = 10_000
UNSYNCED_BYTES = 32 << 20  # written and not yet on the disk: a signal must not have to wait for much more
MAX_FOOTER_BYTES = 4 << 20  # a shard of 64 row groups has some 200 kB
MAX_GROUP_ROWS = 1 << 16  # of what a reader believes; one picture at the model's own limit is 0.5 GB
MAX_GROUP_BYTES = 1 << 32
MAX_METADATA_BYTES = 1 << 20
MAX_TEXT_BYTES = 1 << 28  # of all columns but embeds
PAGE_SLACK = 1 << 16  # levels, lengths
_ESCAPE = re.compile(r"//x[89a-f][0-9a-f]")
MEND = "run `qvsplit extract` again: it sets the file aside and sees the pictures in it anew"
STATUSES = ("ok", "failed", "gone")
KINDS = ("image", "video")

# The exponent's bits, all set in an infinity or NaN
_EXPONENT = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}
_WORDS_AT_A_TIME = 1 << 16
_UNSIGNED = {4: "<u4", 2: "<u2"}


@dataclass(frozen=True, slots=True)
class Row:
    """What is stored of one picture, but for the embeddings themselves. See docs/format.md for each column."""

    root: str
    path: str
    sha256: bytes | None
    size: int
    mtime_ns: int | None
    kind: str
    width: int | None
    height: int | None
    status: str
    error: str | None
    grid_thw: tuple[int, int, int] | None
    n_tokens: int | None
    has_embeds: bool  # False for failed and gone, and for a copy: the same bytes under another name

    @property
    def key(self) -> tuple[str, str]:
        """What names a picture within an album."""
        return self.root, self.path

    @property
    def folder(self) -> tuple[str, str]:
        """The folder that the picture lies in: its root, and its path below that."""
        return self.root, self.path.rpartition("/")[0]


@dataclass(frozen=True)
class Embeds:
    """The embeddings of one picture: `raw` is uint8 [n_tokens, hidden_size · bytes a value], little-endian.

    Of int8 it is [n_tokens, hidden_size + 4]: a token's values, and the float32 that they are to be multiplied by.
    """

    raw: npt.NDArray[np.uint8]
    dtype: str  # float32, bfloat16, float16 or int8
    grid_thw: tuple[int, int, int]

    @property
    def n_tokens(self) -> int:
        """Tokens, the first dimension."""
        return int(self.raw.shape[0])

    @property
    def hidden_size(self) -> int:
        """Width of a token."""
        width = int(self.raw.shape[1])
        return width - SCALE_BYTES if self.dtype == "int8" else width // DTYPE_BYTES[self.dtype]

    def numpy(self) -> npt.NDArray[np.float32] | npt.NDArray[np.float16]:
        """The values, [n_tokens, hidden_size]: float32, or float16 where stored so; bfloat16 widens exactly."""
        import numpy as np

        if self.dtype == "int8":
            scales = np.ascontiguousarray(self.raw[:, -SCALE_BYTES:]).view("<f4")
            values: npt.NDArray[np.float32] = self.raw[:, :-SCALE_BYTES].view(np.int8) * scales
            return values
        words = self.raw.view(_UNSIGNED[DTYPE_BYTES[self.dtype]])
        if self.dtype == "bfloat16":
            words = words.astype(np.uint32) << 16
        return words.view(np.float16) if self.dtype == "float16" else words.view(np.float32)


# ---------------------------------------------------------------------------------------------------------- codec


def to_planes(raw: npt.NDArray[np.uint8], itemsize: int) -> bytes:
    """Little-endian values to byte planes, the most significant first."""
    import numpy as np

    return np.ascontiguousarray(raw.reshape(-1, itemsize).T[::-1]).tobytes()


def from_planes(planes: bytes | memoryview, itemsize: int) -> npt.NDArray[np.uint8]:
    """The inverse of `to_planes`, flat. Shifts whole words, a cache's worth at a time."""
    import numpy as np

    split = np.frombuffer(planes, np.uint8).reshape(itemsize, -1)
    words = np.empty(split.shape[1], f"<u{itemsize}")
    for begin in range(0, len(words), _WORDS_AT_A_TIME):
        some = words[begin : begin + _WORDS_AT_A_TIME]
        some[:] = split[0, begin : begin + _WORDS_AT_A_TIME]
        for plane in split[1:]:
            some <<= 8
            some |= plane[begin : begin + _WORDS_AT_A_TIME]
    raw: npt.NDArray[np.uint8] = words.view(np.uint8)
    return raw


def encode(raw: npt.NDArray[np.uint8], dtype: str) -> bytes:
    """`Embeds.raw` as column `embeds` has it: byte planes; of int8 all values, then the scales' byte planes."""
    import numpy as np

    if dtype == "int8":
        return np.ascontiguousarray(raw[:, :-SCALE_BYTES]).tobytes() + to_planes(
            np.ascontiguousarray(raw[:, -SCALE_BYTES:]), SCALE_BYTES
        )
    return to_planes(raw, DTYPE_BYTES[dtype])


def decode(blob: memoryview, dtype: str, n_tokens: int) -> npt.NDArray[np.uint8]:
    """The inverse of `encode`. ValueError if a value, or a scale, is not finite."""
    import numpy as np

    _refuse_infinite(blob, dtype, n_tokens)
    if dtype == "int8":
        values, scales = blob[: -SCALE_BYTES * n_tokens], blob[-SCALE_BYTES * n_tokens :]
        halves = (np.frombuffer(values, np.uint8), from_planes(scales, SCALE_BYTES))
        return np.concatenate([half.reshape(n_tokens, -1) for half in halves], axis=1)
    return from_planes(blob, DTYPE_BYTES[dtype]).reshape(n_tokens, -1)


def _refuse_infinite(blob: bytes | memoryview, dtype: str, n_tokens: int) -> None:
    """ValueError if a value is not finite; of int8 only scales can be."""
    sound = all_finite(blob[-SCALE_BYTES * n_tokens :], "float32") if dtype == "int8" else all_finite(blob, dtype)
    if not sound:
        raise ValueError("has values that are not finite")


def all_finite(planes: bytes | memoryview, dtype: str) -> bool:
    """Whether no value of these byte planes is an infinity or NaN.

    Their exponents have all bits set. Most of those bits are in the first plane, which is nearly always all there is
    to look at.
    """
    import numpy as np

    split = np.frombuffer(planes, np.uint8).reshape(DTYPE_BYTES[dtype], -1)
    high, low = (_EXPONENT[dtype] >> 8 * place & 0xFF for place in (DTYPE_BYTES[dtype] - 1, DTYPE_BYTES[dtype] - 2))
    suspect = (split[0] & high) == high
    return not bool(suspect.any() and (split[1][suspect] & low == low).any())


def grid_error(row: Row, recipe: Recipe) -> str | None:
    """Why grid and tokens of a row that has both do not belong together; None if they do."""
    assert row.grid_thw is not None
    t, h, w = row.grid_thw
    merge = recipe.merge_size
    if min(t, h, w) < 1 or h % merge or w % merge:
        return f"has the grid {t}×{h}×{w}, which {merge}×{merge} patches a token do not divide"
    if row.n_tokens != t * h * w // merge**2:
        return f"has {row.n_tokens} tokens, and its grid {t}×{h}×{w} makes {t * h * w // merge**2}"
    return None


def check_embeds(row: Row, length: int, *, hidden_size: int, recipe: Recipe) -> None:
    """ValueError unless grid, tokens and byte length of a row with embeddings belong together."""
    if row.grid_thw is None or row.n_tokens is None:
        raise ValueError("has embeddings but no grid")
    if wrong := grid_error(row, recipe):
        raise ValueError(wrong)
    expected = row.n_tokens * token_bytes(recipe.stored_dtype, hidden_size)
    if length != expected:
        raise ValueError(f"has {length} bytes of embeddings instead of {expected}")


# --------------------------------------------------------------------------------------------------------- writer


def schema(recipe: Recipe, made: Made, hidden_size: int) -> pa.Schema:
    """Format 1's columns, with the recipe in the metadata."""
    import pyarrow as pa

    content = {"recipe": recipe.to_json(), "hidden_size": hidden_size, "made": made.to_json()}
    return pa.schema([pa.field(name, kind) for name, kind in _columns().items()]).with_metadata(
        {METADATA_KEY: json.dumps(content, sort_keys=True).encode()}
    )


def _columns() -> dict[str, pa.DataType]:
    import pyarrow as pa

    return {
        "root": pa.string(),
        "path": pa.string(),
        "sha256": pa.binary(32),
        "size": pa.int64(),
        "mtime_ns": pa.int64(),
        "kind": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "status": pa.string(),
        "error": pa.string(),
        "grid_thw": pa.list_(pa.int32(), 3),
        "n_tokens": pa.int32(),
        "has_embeds": pa.bool_(),
        "embeds": pa.large_binary(),
    }


class ShardWriter:
    """Writes one shard, which appears under its name whole or not at all.

    Rows go to a hidden temporary file in the same folder as they come; `finish` seals the footer, syncs the file,
    renames it and syncs the folder. Until then the shard does not exist. What is not guaranteed: that a disk which
    lies about syncing keeps its word.
    """

    def __init__(self, target: Path, *, recipe: Recipe, made: Made, hidden_size: int) -> None:
        import pyarrow.parquet as pq

        self.target = target
        self.recipe = recipe
        self.hidden_size = hidden_size
        self.rows = 0
        self.bytes = 0  # of embeddings, before compression
        self._group: list[tuple[Row, bytes | None]] = []
        self._group_bytes = 0
        self._synced = 0
        self._temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        self._schema = schema(recipe, made, hidden_size)
        with disk_errors(target.parent):
            self._file: IO[bytes] = self._temporary.open("xb")
            self._parquet = pq.ParquetWriter(
                self._file,
                self._schema,
                compression="zstd",
                compression_level=ZSTD_LEVEL,
                use_dictionary=["root", "kind", "status"],
                write_statistics=["path", "status"],
                write_page_checksum=True,
            )

    def add(self, row: Row, raw: npt.NDArray[np.uint8] | None) -> None:
        """One row; `raw` [n_tokens, hidden_size · bytes] are its embeddings in the stored dtype, or None.

        ValueError (our own mistake, or a tower's) if they do not fit the row or are not finite.
        """
        planes = None
        if row.has_embeds != (raw is not None):
            raise ValueError(
                "says has_embeds, and is given none" if row.has_embeds else "is given embeddings it denies"
            )
        if raw is not None:
            check_embeds(row, raw.nbytes, hidden_size=self.hidden_size, recipe=self.recipe)
            planes = encode(raw, self.recipe.stored_dtype)
            _refuse_infinite(planes, self.recipe.stored_dtype, len(raw))
        self._group.append((row, planes))
        self._group_bytes += len(planes or b"")
        self.bytes += len(planes or b"")
        self.rows += 1
        if self._group_bytes >= ROW_GROUP_BYTES or len(self._group) >= ROW_GROUP_ROWS:
            self._flush()

    def finish(self) -> int:
        """Make the shard appear; gives its size in bytes. Where that fails nothing is left behind."""
        try:
            return self._finish()
        except BaseException:
            self.abandon()
            raise

    def _finish(self) -> int:
        with disk_errors(self.target.parent):
            self._flush()
            self._parquet.close()
            self._file.close()
            with self._temporary.open("r+b") as stream:
                _seal(stream)
                stream.flush()
                os.fsync(stream.fileno())
                size = stream.tell()
            os.rename(self._temporary, self.target)
            sync_folder(self.target.parent)
        return size

    def abandon(self) -> None:
        """Leave nothing behind."""
        with suppress(Exception):  # it may be mid-write on a full disk: closing must not hide why we are here
            self._parquet.close()
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._temporary.unlink()

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._group:
            return
        columns = {name: [getattr(row, name) for row, _ in self._group] for name in _columns() if name != "embeds"}
        columns["embeds"] = [planes for _, planes in self._group]
        table = pa.table(
            {name: pa.array(values, self._schema.field(name).type) for name, values in columns.items()},
            schema=self._schema,
        )
        self._group, self._group_bytes = [], 0
        with disk_errors(self.target.parent):
            self._parquet.write_table(table, row_group_size=ROW_GROUP_ROWS)
            if self._file.tell() - self._synced >= UNSYNCED_BYTES:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._synced = self._file.tell()


def _seal(stream: IO[bytes]) -> None:
    """Insert the footer's checksum before the footer. Leaves the stream at the file's end."""
    end = stream.seek(0, os.SEEK_END)
    stream.seek(end - 8)
    length = int.from_bytes(stream.read(4), "little")
    stream.seek(end - 8 - length)
    footer = stream.read(length)
    stream.seek(end - 8 - length)
    stream.write(SEAL_MAGIC + hashlib.sha256(footer).digest() + footer + length.to_bytes(4, "little") + MAGIC)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(
    place: Path | str, kept: str = "finished shards are kept", elsewhere: str = "choose another --out"
) -> Iterator[None]:
    """Turns a full disk or a place that cannot be written into a DiskError that says which, and what is `kept`."""
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        what = "the disk is full" if full else f"cannot be written ({error.strerror or error})"
        todo = "make room and run again" if full else f"{elsewhere}, or mend its permissions"
        raise DiskError("; ".join(part for part in (f"{place}: {what}", kept, todo) if part)) from error


# --------------------------------------------------------------------------------------------------------- reader


@dataclass(frozen=True)
class Told:
    """What is known of a shard without opening it: what it said of itself when it had this `seal`.

    `columns` are the rows' values, in the order of `Row`'s fields.
    """

    seal: bytes
    recipe: Recipe
    made: Made
    hidden_size: int
    columns: Sequence[Sequence[Any]]


class Shard:
    """A finished shard, checked. Rows are read at once; embeddings one by one, on demand.

    With `told` the rows are taken from there, and the file is opened when the first embeddings are wanted. The file is
    open only while something is read from it: an album may have more shards than a process may have open files.
    AlbumDamaged, naming file, row and column, for anything that is not what a writer wrote.
    """

    def __init__(self, path: Path, told: Told | None = None) -> None:
        self.path = path
        self._seal = None if told is None else told.seal
        self._metadata: Any = None  # pyarrow's FileMetaData
        self._chunks: list[list[Chunk]] = []
        self._group_starts: list[int] = []
        if told is None:
            self.recipe, self.made, self.hidden_size = self._read_footer()
            self.rows = self._as_rows(self._read_columns())
        else:
            self.recipe, self.made, self.hidden_size = told.recipe, told.made, told.hidden_size
            self.rows = self._as_rows(told.columns)

    def _read_footer(self) -> tuple[Recipe, Made, int]:
        with self._damage("its footer"):
            footer = _sealed_footer(self.path)
            if self._seal not in {None, hashlib.sha256(footer).digest()}:
                raise ValueError("it is no longer the shard that it was when its rows were read")
            self._chunks = chunks(footer)
            with self._open() as parquet:
                self._metadata = parquet.metadata
                columns = parquet.schema_arrow
        told = self._read_metadata(columns)
        self._group_starts = self._check_groups()
        if self._seal is not None and self._metadata.num_rows != len(self.rows):
            raise self._damaged("it has another number of rows than it had")
        return told

    def _ready(self) -> None:
        """Open the file for the first time, where rows came from elsewhere."""
        if self._metadata is None:
            self._read_footer()

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        # by bytes: pyarrow takes no str whose bytes are not UTF-8
        with (
            pa.OSFile(os.fsencode(self.path)) as file,
            pq.ParquetFile(file, metadata=self._metadata, page_checksum_verification=True, pre_buffer=False) as parquet,
        ):
            yield parquet

    def embeds(self, index: int) -> Embeds:
        """The embeddings of row `index`, checked."""
        self._ready()
        row = self.rows[index]
        group = bisect_right(self._group_starts, index) - 1
        with self._damage(f"column embeds of row {index} ({row.path})"):
            blob = self._blobs(group)[index - self._group_starts[group]].as_buffer()
        return self._checked(row, index, blob)

    def __iter__(self) -> Iterator[tuple[int, Row, Embeds | None]]:
        """Every row with its embeddings, each row group read once."""
        self._ready()
        for group, start in enumerate(self._group_starts):
            with self._damage(f"column embeds, row group {group}"):
                column = self._blobs(group)
            for offset in range(len(column)):
                index = start + offset
                blob = column[offset].as_buffer()
                row = self.rows[index]
                if row.has_embeds != (blob is not None):
                    raise self._damaged(
                        f"row {index} ({row.path}) has_embeds is {row.has_embeds}, its embeds say otherwise"
                    )
                yield index, row, None if blob is None else self._checked(row, index, blob)

    def _blobs(self, group: int) -> Any:
        """Column `embeds` of one row group. A damaged page header can make a reader give fewer values, silently."""
        start, count = self._group_starts[group], self._metadata.row_group(group).num_rows
        rows = [row for row in self.rows[start : start + count] if row.has_embeds]
        expected = sum(row.n_tokens or 0 for row in rows) * token_bytes(self.recipe.stored_dtype, self.hidden_size)
        self._check_pages(group, ["embeds"], expected + 16 * count + PAGE_SLACK)
        with self._open() as parquet:
            parts = parquet.read_row_group(group, columns=["embeds"], use_threads=False).column(0)
        column = parts.chunk(0) if parts.num_chunks == 1 else parts.combine_chunks()  # which copies
        if len(column) != self._metadata.row_group(group).num_rows:
            raise ValueError("fewer values than rows")
        return column

    def _checked(self, row: Row, index: int, blob: Any) -> Embeds:
        if blob is None:
            raise AlbumDamaged(f"{self.path}: row {index} ({row.path}) holds no embeddings of its own")
        try:
            check_embeds(row, blob.size, hidden_size=self.hidden_size, recipe=self.recipe)
            assert row.n_tokens is not None  # check_embeds has seen to it
            assert row.grid_thw is not None
            raw = decode(memoryview(blob), self.recipe.stored_dtype, row.n_tokens)
        except ValueError as error:
            raise self._damaged(f"row {index} ({row.path}) {error}") from None
        return Embeds(raw, self.recipe.stored_dtype, row.grid_thw)

    def _read_metadata(self, columns: pa.Schema) -> tuple[Recipe, Made, int]:
        metadata = self._metadata.metadata or {}
        try:
            if len(metadata[METADATA_KEY]) > MAX_METADATA_BYTES:
                raise ValueError("longer than any writer's")
            content = json.loads(metadata[METADATA_KEY])
            hidden_size = content["hidden_size"]
            if not isinstance(hidden_size, int) or not 1 <= hidden_size <= 1 << 20:
                raise ValueError(hidden_size)
        except (KeyError, ValueError, TypeError, RecursionError):
            raise self._damaged("it is a Parquet file, but not one that qvsplit wrote") from None
        try:
            recipe = Recipe.from_json(content.get("recipe"), str(self.path))
        except AlbumDamaged as error:
            raise ShardDamaged(str(error), str(self.path), "its metadata hold no recipe") from None
        if columns.names != list(_columns()) or any(columns.field(n).type != kind for n, kind in _columns().items()):
            raise self._damaged("its columns are not format 1's")
        return recipe, Made.from_json(content.get("made")), hidden_size

    def _check_groups(self) -> list[int]:
        """The first row of each row group. Refuses claims beyond format 1's bounds before memory is asked for."""
        described = [self._metadata.row_group(group) for group in range(self._metadata.num_row_groups)]
        sizes = [group.num_rows for group in described]
        if any(size < 1 for size in sizes) or sum(sizes) != self._metadata.num_rows:
            raise self._damaged("its row counts contradict each other")
        if any(size > MAX_GROUP_ROWS for size in sizes) or any(g.total_byte_size > MAX_GROUP_BYTES for g in described):
            raise self._damaged("one of its row groups claims more than any writer puts there")
        return [0, *accumulate(sizes[:-1])] if sizes else []

    def _check_pages(self, group: int, names: list[str], room: int) -> None:
        """ValueError if decoding these columns might take more than `room`, whatever the footer says of them."""
        rows = self._metadata.row_group(group).num_rows
        most = max(room, MAX_TEXT_BYTES)  # of what a dictionary might be repeated to
        with open(self.path, "rb") as stream:
            for column in self._chunks[group]:
                if column.column not in names:
                    continue
                values = 0
                for page in pages(stream, column.start, column.length):
                    values += page.values
                    room -= page.size
                    most -= page.size * rows if page.repeats else 0
                    if room < 0 or most < 0:
                        raise ValueError("more than its rows can need")
                if values > rows * (3 if column.column == "grid_thw" else 1):
                    raise ValueError("more values than its rows can have")

    def _read_columns(self) -> list[list[Any]]:
        names = [name for name in _columns() if name != "embeds"]
        with self._damage(f"a column of {', '.join(names)}"):
            columns: dict[str, list[Any]] = {name: [] for name in names}
            room = MAX_TEXT_BYTES
            with self._open() as parquet:
                for group in range(len(self._group_starts)):
                    self._check_pages(group, names, MAX_TEXT_BYTES)
                    table = parquet.read_row_group(group, columns=names)
                    room -= table.nbytes
                    if room < 0:
                        raise ValueError("more text than any writer puts there")
                    for name in names:
                        columns[name] += table.column(name).to_pylist()
            if any(len(column) != self._metadata.num_rows for column in columns.values()):
                raise ValueError("fewer values than rows")
        return list(columns.values())

    def _as_rows(self, columns: Sequence[Sequence[Any]]) -> list[Row]:
        rows = []
        same: dict[str, str] = {}  # one string for what most rows have in common
        for index, values in enumerate(zip(*columns, strict=True)):
            root, path, sha256, size, mtime_ns, kind, width, height, status, error, grid, n_tokens, has_embeds = values
            row = Row(
                same.setdefault(root, root), path, sha256, size, mtime_ns, same.setdefault(kind, kind), width, height,
                same.setdefault(status, status), error, None if grid is None else tuple(grid), n_tokens, has_embeds,
            )  # fmt: skip
            self._check_row(index, row)
            rows.append(row)
        return rows

    def _check_row(self, index: int, row: Row) -> None:
        wrong = None
        path, root = (_ESCAPE.sub("?", name) if name and "//" in name else name or "" for name in (row.path, row.root))
        if row.status not in STATUSES or row.kind not in KINDS:
            wrong = f"has status {row.status!r} and kind {row.kind!r}"
        elif not row.path or row.root is None or row.size is None or row.has_embeds is None:
            wrong = "lacks root, path, size or has_embeds"
        elif path.startswith("/") or "//" in path or "\0" in path or ".." in path.split("/"):
            wrong = "has a path that leads out of its root"
        elif "\0" in root or "//" in root:
            wrong = "has a root that no folder can have"
        elif row.grid_thw is not None and None in row.grid_thw:
            wrong = "has a grid with a gap"
        elif row.status == "ok" and (row.sha256 is None or row.grid_thw is None or row.n_tokens is None):
            wrong = "is ok, but lacks hash, grid or token count"
        elif row.status == "ok" and (unfit := grid_error(row, self.recipe)):
            wrong = unfit
        elif row.has_embeds and row.status != "ok":
            wrong = f"is {row.status}, yet claims embeddings"
        if wrong:
            raise self._damaged(f"row {index} ({row.path}) {wrong}")

    def _damaged(self, what: str) -> ShardDamaged:
        return ShardDamaged(f"{self.path} is damaged: {what}; {MEND}", str(self.path), what)

    @contextmanager
    def _damage(self, what: str) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except FileNotFoundError:
            raise AlbumDamaged(f"{self.path} is gone; run `qvsplit extract` again to make it anew") from None
        except NotAShard as error:
            what = f"not a qvsplit shard: {error}"
            raise ShardDamaged(f"{self.path} is {what}", str(self.path), what) from None
        except MemoryError:
            raise QvsplitError(f"{self.path} cannot be read: not enough memory") from None
        except OSError as error:
            if error.errno is not None:  # the system's word, not pyarrow's on what it read
                raise AlbumDamaged(f"{self.path} cannot be read ({error.strerror})") from None
            raise self._damaged(f"{what}: {error}") from None
        except (ValueError, pa.ArrowException) as error:
            raise self._damaged(f"{what}: {error}") from None


class NotAShard(ValueError):
    """Neither sealed nor damaged: something else altogether."""


def leave(path: Path, payload: bytes) -> None:
    """A cache file, whole or not at all, headed by its hash. Where it cannot be written nothing is lost but time."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with suppress(OSError):
        try:
            temporary.write_bytes(hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def left(path: Path) -> bytes | None:
    """What `leave` wrote; None where there is nothing, or not what was written."""
    try:
        told, _, payload = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return payload if told == hashlib.sha256(payload).hexdigest().encode() else None


def read_seal(path: Path) -> bytes:
    """The footer's SHA-256, which names a shard's content, held against the footer. See `_sealed_footer`."""
    return hashlib.sha256(_sealed_footer(path)).digest()


def _sealed_footer(path: Path) -> bytes:
    """The footer, held against its SHA-256. Reads the shard's two ends only.

    NotAShard, or ValueError for a damaged one, by its first and last bytes and that checksum.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not make us wait
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotAShard("it is not a regular file")
        head = stream.read(4)
        end = stream.seek(0, os.SEEK_END)
        if head != MAGIC:
            raise NotAShard("it is not a Parquet file")
        stream.seek(max(0, end - 8))
        tail = stream.read(8)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != MAGIC or length > min(end - 12 - SEAL_BYTES, MAX_FOOTER_BYTES):
            raise ValueError("it is cut short or overwritten")
        stream.seek(end - 8 - length - SEAL_BYTES)
        seal, footer = stream.read(SEAL_BYTES), stream.read(length)
    if not seal.startswith(SEAL_MAGIC):
        raise NotAShard("it is a Parquet file without qvsplit's seal, or altered since")
    if seal[len(SEAL_MAGIC) :] != hashlib.sha256(footer).digest():
        raise ValueError("its checksum does not match")
    return footer
