"""Whether two stores are the same: the same current rows and features bit for bit, nothing twice, nothing left over."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from qvsplit.store import layout
from qvsplit.store.opening import open_store
from tests.support.rows import raws

_OWN = {layout.LOCK, layout.CATALOGUE, layout.HISTORY, layout.WALKED}  # of a store at rest, beside its shards


def differences(folder: Path, expected: Path) -> list[str]:
    """Say in what a store is not as another one, generations aside. One item at a time is in memory."""
    with open_store(folder) as one, open_store(expected) as other:
        rows, expected_rows = ({(*row.key, row.part): row for row in store.rows} for store in (one, other))
        wrong = [f"not there: {key}" for key in expected_rows.keys() - rows.keys()]
        wrong += [f"not expected: {key}" for key in rows.keys() - expected_rows.keys()]
        for key in rows.keys() & expected_rows.keys():
            row, like = rows[key], expected_rows[key]
            if replace(row, generation=0, has_features=False) != replace(like, generation=0, has_features=False):
                wrong.append(f"another row: {key}")
            elif row.status == "ok" and raws(one.features(row)) != raws(other.features(like)):
                wrong.append(f"other features: {key}")
    return wrong + doubled(folder) + left_over(folder)


def doubled(folder: Path) -> list[str]:
    """Say what the shards hold twice: features of one content, or rows of one part in its last generation."""
    columns = ["root", "path", "part", "generation", "sha256", "has_features"]
    rows = [row for shard in folder.glob("*.parquet") for row in pq.read_table(shard, columns=columns).to_pylist()]
    content = Counter((row["sha256"], row["part"]) for row in rows if row["has_features"])
    last: dict[tuple[str, str], int] = {}
    for row in rows:
        key = row["root"], row["path"]
        last[key] = max(last.get(key, 0), row["generation"])
    current = Counter(
        (row["root"], row["path"], row["part"]) for row in rows if row["generation"] == last[row["root"], row["path"]]
    )
    return [f"content held {count} times: {one}" for one, count in content.items() if count > 1] + [
        f"current {count} times: {one}" for one, count in current.items() if count > 1
    ]


def left_over(folder: Path) -> list[str]:
    """Say what lies in a store that should not, once no run is at work."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    names += [str(path.relative_to(folder)) for path in (folder / layout.STAGING).glob("*") if path.is_dir()]
    return [
        f"left over: {name}"
        for name in names
        if layout.shard_number(name) is None and name not in _OWN and not name.startswith(layout.GENERATIONS)
    ]
