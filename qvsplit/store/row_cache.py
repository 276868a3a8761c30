"""Cache: the rows of a store's shards, side by side in one file, so that opening the store opens no shard.

A shard's rows count only as long as its footer has the checksum that it had when they were read; without the file they
are read from the shards. Standard library only: JSON is read faster than as many Parquet files are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from qvsplit.errors import QvsplitError
from qvsplit.store import layout
from qvsplit.store.cache_file import read_cache, write_cache
from qvsplit.store.schema import ShardSchema
from qvsplit.store.shard_reader import ROW_FIELDS, Shard, ShardSnapshot, read_checksum
from qvsplit.store.storage import Storage

_VERSION = 2


def open_shards(storage: Storage, names: Sequence[str]) -> list[Shard]:
    """Open these shards, each with its rows from the cache where that still knows it."""
    known = _read(storage)
    schemas: dict[str, ShardSchema] = {}  # most shards share one
    return [_open(storage, name, known, schemas) for name in names]


def write_rows(storage: Storage, names: Sequence[str]) -> None:
    """Bring the cache up to date with the shards of these names; only those it does not know are opened."""
    before = _read(storage)
    lines = []
    with suppress(OSError, ValueError, QvsplitError):  # what is wrong with a shard is reported where it is read
        for name in names:
            heading = _heading(name, read_checksum(storage, name))
            lines.append(heading + b"\t" + (before.get(heading) or _line(Shard(storage, name))))
        write_cache(storage, layout.ROWS, b"\n".join(lines))


def _heading(name: str, checksum: bytes) -> bytes:
    return f"{name} {checksum.hex()} {_VERSION}".encode()


def _line(shard: Shard) -> bytes:
    columns = {name: [getattr(row, name) for row in shard.rows] for name in ROW_FIELDS}
    return json.dumps({"schema": shard.schema.to_json(), "columns": columns}, sort_keys=True).encode()


def _read(storage: Storage) -> Mapping[bytes, bytes]:
    """Give each shard's line by its heading."""
    payload = read_cache(storage, layout.ROWS)
    if payload is None:
        return {}
    parts = (line.partition(b"\t") for line in payload.split(b"\n"))
    return {heading: line for heading, _, line in parts}


def _open(storage: Storage, name: str, known: Mapping[bytes, bytes], schemas: dict[str, ShardSchema]) -> Shard:
    if known:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, QvsplitError):
            checksum = read_checksum(storage, name)
            line = known.get(_heading(name, checksum))
            if line is not None:
                return Shard(storage, name, _snapshot(checksum, json.loads(line), storage.where(name), schemas))
    return Shard(storage, name)


def _snapshot(
    checksum: bytes, content: Mapping[str, Any], where: str, schemas: dict[str, ShardSchema]
) -> ShardSnapshot:
    columns = {name: content["columns"][name] for name in ROW_FIELDS}
    if len({len(column) for column in columns.values()}) != 1:
        raise ValueError("columns of unequal length")
    digest = hashlib.sha256(json.dumps(content["schema"], sort_keys=True).encode()).hexdigest()
    if digest not in schemas:
        schemas[digest] = ShardSchema.from_json(content["schema"], where)
    return ShardSnapshot(checksum, schemas[digest], columns)
