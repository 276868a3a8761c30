"""Rows as a table of Arrow, for whoever goes on with pandas, Polars or SQL."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qvsplit.store import codec
from qvsplit.store.features import Features, TensorSpec
from qvsplit.store.row import Row
from qvsplit.store.schema import row_columns

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_A_TIME = 1 << 13


def rows_table(
    rows: Iterable[Row], tensors: Sequence[TensorSpec] = (), features: Callable[[Row], Features] | None = None
) -> pa.Table:
    """Give rows as a table, a column for each field; with `features` also the columns that shards have of `tensors`."""
    import pyarrow as pa

    columns: dict[str, Any] = dict(row_columns()) | {spec.column: pa.large_binary() for spec in tensors}
    schema = pa.schema([pa.field(name, kind) for name, kind in columns.items()])
    batches, some = [], []
    for row in rows:
        values: dict[str, Any] = {name: getattr(row, name) for name in row_columns()}
        if features is not None and row.status == "ok":
            values |= _blobs(features(row), tensors)
        some.append(values)
        if len(some) == ROWS_AT_A_TIME:
            batches.append(pa.RecordBatch.from_pylist(some, schema=schema))
            some = []
    batches.append(pa.RecordBatch.from_pylist(some, schema=schema))
    return pa.Table.from_batches(batches, schema=schema)


def _blobs(features: Features, tensors: Sequence[TensorSpec]) -> dict[str, bytes]:
    return {spec.column: bytes(codec.encode(features.tensors[spec.key].raw, spec.dtype)) for spec in tensors}
