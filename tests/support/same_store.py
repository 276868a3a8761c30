"""Whether two stores are the same: the same current rows, and the same features bit for bit, each content once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from qvsplit.store.opening import open_store


def rows_and_features(folder: Path) -> tuple[dict, dict]:
    """Current rows by item and part, without what a run alone knows; features by content, as bytes."""
    with open_store(folder) as store:
        rows = {(*row.key, row.part): replace(row, generation=0, has_features=False) for row in store.rows}
        features = {
            row.content: {name: tensor.raw.tobytes() for name, tensor in store.features(row).tensors.items()}
            for row in store.rows
            if row.status == "ok"
        }
    return rows, features


def times_held(folder: Path) -> Counter:
    """How many rows of all shards hold the features of each content, by SHA-256 and part."""
    held: Counter = Counter()
    for shard in folder.glob("shard-*.parquet"):
        table = pq.read_table(shard, columns=["sha256", "part", "has_features"]).to_pylist()
        held.update((row["sha256"], row["part"]) for row in table if row["has_features"])
    return held


def left_over(folder: Path) -> list[str]:
    """What is staged, and nobody writes any more."""
    return [str(path.relative_to(folder)) for path in (folder / ".qvsplit" / "staging").rglob("*")]


def assert_same(folder: Path, expected: Path) -> None:
    """Fail unless both stores are the same, and nothing in `folder` is there twice or left over."""
    (rows, features), (rows_expected, features_expected) = rows_and_features(folder), rows_and_features(expected)
    assert rows == rows_expected
    assert features == features_expected
    assert set(times_held(folder).values()) <= {1}
    assert left_over(folder) == []
