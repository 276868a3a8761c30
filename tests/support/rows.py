"""Rows, features, extraction configs, shards and stores for tests: small, and without a model."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qvsplit.store.config import ExtractionConfig, Provenance
from qvsplit.store.features import DEEPSTACK_FEATURES, POOLER_OUTPUT, Features, StoredTensor, TensorSpec
from qvsplit.store.footer import insert_checksum
from qvsplit.store.row import Row, placeholder_json
from qvsplit.store.schema import ShardSchema
from qvsplit.store.shard_reader import Shard
from qvsplit.store.shard_writer import ShardWriter
from qvsplit.store.storage import LocalStorage, Storage
from qvsplit.store.store import Store

WIDTH = 16
DTYPES = ("float32", "float16", "bfloat16", "int8")
PROVENANCE = Provenance("some/model", None, "cpu", {"torch": "2"})
VIDEOS: dict[str, Any] = {"rule": 1, "clip_seconds": 1.5, "settings": {"merge_size": 2}}
PROCESSOR = {"merge_size": 2, "min_pixels": 3136, "max_pixels": 1003520}
Pair = tuple[Row, Features | None]


def config(dtype: str = "bfloat16", **changes: Any) -> ExtractionConfig:
    """Give an extraction config; no encoder is behind it."""
    whole = ExtractionConfig(
        family="qwen2_vl", encoder="0" * 64, processor=PROCESSOR, compute_dtype="float32", storage_dtype=dtype,
        images={"orientation": "exif"}, kernels="reference",
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)


_config = config


def specs(dtype: str = "bfloat16", *, levels: int = 0, width: int = WIDTH) -> tuple[TensorSpec, ...]:
    """Give the tensors of a shard: `pooler_output`, and so many levels of `deepstack_features`."""
    more = (TensorSpec(DEEPSTACK_FEATURES, dtype, width, "list", level) for level in range(levels))
    return (TensorSpec(POOLER_OUTPUT, dtype, width), *more)


def schema(
    dtype: str = "bfloat16", *, levels: int = 0, width: int = WIDTH, provenance: Sequence[Provenance] = (PROVENANCE,),
    config: ExtractionConfig | None = None,
) -> ShardSchema:  # fmt: skip
    """Give what a shard declares."""
    return ShardSchema(config or _config(dtype), specs(dtype, levels=levels, width=width), tuple(provenance))


def values(n_tokens: int, dtype: str = "bfloat16", seed: int = 0, width: int = WIDTH) -> np.ndarray:
    """Give finite values as `StoredTensor.raw` has them: uint8 [n_tokens, bytes a token]."""
    rng = np.random.default_rng(seed)
    if dtype == "int8":
        whole = rng.integers(-127, 128, (n_tokens, width)).astype(np.int8).view(np.uint8)
        return np.concatenate([whole, rng.random((n_tokens, 1), np.float32).view(np.uint8)], axis=1)
    floats = rng.standard_normal((n_tokens, width)).astype(np.float32)
    return as_stored(floats, dtype).view(np.uint8).reshape(n_tokens, -1)


def as_stored(floats: np.ndarray, dtype: str) -> np.ndarray:
    """Turn float32 into words of `dtype`; bfloat16 by cutting."""
    if dtype == "bfloat16":
        return (floats.view(np.uint32) >> 16).astype(np.uint16)
    return floats.astype({"float32": np.float32, "float16": np.float16}[dtype])


def runs(tokens: int) -> tuple[tuple[str, int], ...]:
    """Give the placeholder of an image of so many tokens."""
    return (("<|vision_start|>", 1), ("<|image_pad|>", tokens), ("<|vision_end|>", 1))


def sha(name: str) -> str:
    """Give the hash that an item's bytes have here: that of a text."""
    return hashlib.sha256(name.encode()).hexdigest()


def row(name: str = "a.png", tokens: int = 6, **changes: Any) -> Row:
    """Give an `ok` row with features of its own; `tokens` is even."""
    whole = Row(
        root="/photos", path=name, sha256=sha(name), size=10, mtime_ns=5, version="5-5", kind="image", width=84,
        height=56, status="ok", grid_thw=(1, 4, tokens), n_tokens=tokens, placeholder=placeholder_json(runs(tokens)),
        inputs="{}", generation=1, has_features=True,
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)


_FAILED: dict[str, Any] = {
    "status": "failed", "error": "is empty", "error_kind": "content", "grid_thw": None, "n_tokens": None,
    "placeholder": None, "inputs": None, "width": None, "height": None, "has_features": False,
}  # fmt: skip


def failed(name: str, **changes: Any) -> Row:
    """Give the row of an item that could not be read."""
    return row(name, **(_FAILED | changes))


def deleted(name: str, **changes: Any) -> Row:
    """Give the row of an item whose file no longer exists."""
    merged: dict[str, Any] = {"status": "deleted", "has_features": False} | changes
    return row(name, **merged)


def features(
    tokens: int = 6, dtype: str = "bfloat16", seed: int = 0, *, levels: int = 0, raw: np.ndarray | None = None,
    width: int = WIDTH,
) -> Features:  # fmt: skip
    """Give features of so many tokens, or of the values in `raw`."""
    tensors = {
        spec.key: StoredTensor(values(tokens, dtype, seed + 1000 * number, width), dtype)
        for number, spec in enumerate(specs(dtype, levels=levels, width=width))
    }
    if raw is not None:
        tensors[POOLER_OUTPUT] = StoredTensor(raw, dtype)
    return Features(config(dtype), tensors, (1, 4, tokens), runs(tokens))


def item(name: str, tokens: int = 6, *, dtype: str = "bfloat16", levels: int = 0, **changes: Any) -> Pair:
    """Give a row and its features, whose values follow from the content: the same bytes, the same values."""
    one = row(name, tokens, **changes)
    seed = int(str(one.sha256)[:6], 16) + one.part
    return one, features(tokens, dtype, seed, levels=levels) if one.has_features else None


def part(name: str, number: int, of: int, tokens: int = 6, *, seconds: float = 1.5, **changes: Any) -> Pair:
    """Give one of so many parts of a video, and its features; each has so many seconds."""
    times = {"start": number * seconds, "end": (number + 1) * seconds, "duration": of * seconds}
    return item(name, tokens, **{"kind": "video", "part": number, **times, **changes})


def parts(name: str, of: int, **changes: Any) -> list[Pair]:
    """Give all parts of a video, each of another length, in order."""
    return [part(name, number, of, tokens=4 + 2 * number, **changes) for number in range(of)]


def without_features(pairs: Iterable[Pair], **changes: Any) -> list[Pair]:
    """Give rows as those that hold no features of their own: copies, say."""
    return [(dataclasses.replace(one, has_features=False, **changes), None) for one, _ in pairs]


def write_shard(
    storage: Storage | Path, name: str, pairs: Iterable[Pair], declared: ShardSchema | None = None
) -> Shard:
    """Write a shard and open it."""
    where = LocalStorage(storage) if isinstance(storage, Path) else storage
    writer = ShardWriter(where, name, declared or schema())
    try:
        for one, own in pairs:
            writer.add(one, own)
    except BaseException:
        writer.abandon()
        raise
    writer.finish()
    return Shard(where, name)


def write_store(storage: Storage | Path, *shards: Iterable[Pair], declared: ShardSchema | None = None) -> Storage:
    """Write a store of these shards, numbered from 1."""
    where = LocalStorage(storage) if isinstance(storage, Path) else storage
    for number, pairs in enumerate(shards, 1):
        write_shard(where, f"shard-{number:06d}.parquet", pairs, declared)
    return where


def raws(one: Features | None) -> dict[str, bytes] | None:
    """Give the bytes of features, to be compared."""
    return None if one is None else {name: one.tensors[name].raw.tobytes() for name in one}


def contents(store: Store) -> dict[tuple[str, str, int], tuple[Row, dict[str, bytes] | None]]:
    """Give what makes two stores the same: current rows, and their features by content.

    Which row of several with the same content holds the features does not count.
    """
    return {
        (one.root, one.path, one.part): (
            dataclasses.replace(one, has_features=False), raws(store.features(one)) if one.status == "ok" else None
        )
        for one in store.rows
    }  # fmt: skip


def contents_without_features(store: Store) -> list[Row]:
    """Give the current rows, but for which of several with the same content holds the features."""
    return [dataclasses.replace(one, has_features=False) for one in store.rows]


def with_checksum(table: pa.Table, **options: Any) -> bytes:
    """Write a table as a hostile hand would: any content, and the right footer checksum."""
    stream = io.BytesIO()
    pq.write_table(table, stream, write_page_checksum=True, **options)
    insert_checksum(stream)
    return stream.getvalue()


def changed(table: pa.Table, name: str, content: Sequence[Any]) -> pa.Table:
    """Give a table one column's first values of which are replaced."""
    old = table.column(name).to_pylist()
    return table.set_column(
        table.schema.get_field_index(name),
        table.schema.field(name),
        pa.array([*content, *old[len(content) :]], table.schema.field(name).type),
    )
