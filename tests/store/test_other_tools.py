"""A store in pandas, PyArrow, Polars, DuckDB and Hugging Face datasets, by the lines of the documents."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qvsplit.store.codec import encode
from qvsplit.store.opening import open_store
from qvsplit.store.row import deleted_row
from tests.support import rows

DOCS = Path(__file__).parents[2] / "docs"
FORMAT = (DOCS / "format.md").read_text()
RECIPES = (DOCS / "recipes.md").read_text()
READ = re.findall(
    r"```python\n(import (\w+).*?)```", RECIPES.split("## A store in other tools")[1].split("\n## ")[0], re.S
)
LIVE_PHOTOS = re.findall(r"```python\n(.*?)```", RECIPES.split("## Live Photos")[1].split("\n## ")[0], re.S)
ROWS_CLAUSE, FEATURES_CLAUSE = re.findall(r"```sql\n(.*?)```", FORMAT, re.S)
NUMPY, NUMPY_INT8 = re.findall(r"```python\n(.*?)```", FORMAT, re.S)


def ordered(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of any tool in one order; equal keys by the shard's features."""
    return sorted(
        table, key=lambda row: (row["root"], row["path"], row["part"], row["generation"], row["has_features"])
    )


# ------------------------------------------------------------------------------------------------------- the store


def write(folder: Path, dtype: str = "bfloat16") -> None:
    """A store with everything that can be in one, and with a compaction that was cut short."""

    def item(name: str, **changes: Any) -> rows.Pair:
        return rows.item(name, dtype=dtype, **changes)

    def without(name: str, **changes: Any) -> rows.Pair:
        return rows.row(name, has_features=False, **changes), None

    def clips(of: int, name: str = "clip.mp4", **changes: Any) -> list[rows.Pair]:
        return rows.parts(name, of, dtype=dtype, **changes)

    refreshed = rows.row("refreshed.png", generation=2, mtime_ns=9, version="9", has_features=False)
    shards = {
        2: [
            item("modified.png"), item("deleted.png"), item("refreshed.png"), item("held twice.png"), item("as it was.png"),
            (rows.failed("now ok.png"), None), (rows.failed("torn.png"), None), *clips(3),
            item("modified.png", root="/other photos", sha256=rows.sha("of the same name")),
        ],
        999_998: [
            item("modified.png", generation=2, sha256=rows.sha("new bytes")), (rows.deleted("deleted.png", generation=2), None),
            (refreshed, None), item("now ok.png", generation=2), (rows.failed("torn.png", generation=2, error="is torn"), None),
            # a copy of the bytes that modified.png had, and one of those of a deleted item: no current row has either
            without("copy.png", generation=2, sha256=rows.sha("modified.png")),
            without("moved.png", generation=2, sha256=rows.sha("deleted.png")),
            *clips(2, generation=2, sha256=rows.sha("clip again")),  # one part fewer
        ],
        999_999: rows.without_features(clips(3), path="copy of all parts.mp4", generation=3),
        # by another run, which did not know that these bytes are there: other features, within rounding
        1_000_000: [
            (rows.row("twin.png", generation=3, sha256=rows.sha("held twice.png")), rows.features(6, dtype, seed=77)),
            # cut short before the old shards were deleted: rows as they were, features where they are needed
            item("refreshed.png", generation=2, mtime_ns=9, version="9"), without("as it was.png"),
            *clips(2, generation=2, sha256=rows.sha("clip again")),
        ],
    }  # fmt: skip
    for number, pairs in shards.items():
        rows.write_shard(folder, f"shard-{number:06d}.parquet", pairs, rows.schema(dtype))


def lie_about(folder: Path) -> None:
    """All that a store's folder has beside shards, some of it shards as well, and what was cut short."""
    whole = (folder / "shard-000002.parquet").read_bytes()
    own = folder / ".qvsplit"
    for name in ("lock", "generations/000000000003", "rebuild/.qvsplit/lock"):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).touch()
    for place in ("quarantine", "rebuild", "rebuild/.qvsplit/quarantine"):
        (own / place).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "shard-000002.parquet", own / place / "shard-000002.parquet")
    for name in (
        "quarantine/shard-000001.parquet", "quarantine/shard-000001.parquet.1", "staging/shard-1000001.parquet",
        "staging/.shard-1000001.parquet.4f2a.tmp", "rebuild/.qvsplit/staging/.x.tmp", "../.x.tmp",
    ):  # fmt: skip
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_bytes(whole[: len(whole) // 2])
    for name in ("index.json", "rows.json", "history.jsonl", "damage/shard-000001.parquet.json"):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text(json.dumps({"path": "no row"}) + "\n")
    if not (own / "catalogue.sqlite").exists():
        with sqlite3.connect(own / "catalogue.sqlite") as database:
            database.execute("CREATE TABLE rows AS SELECT 'no row' AS path")
        database.close()


# -------------------------------------------------------------------------------------------------- all rows, anywhere


def arrow_of(read: Any, schema: pa.Schema) -> pa.Table:
    """What a tool gave, as an Arrow table."""
    tool = type(read).__module__.split(".")[0]
    if tool == "pandas":  # which has no integers that may be null: the shards' types bring them back
        return pa.Table.from_pandas(read, schema, preserve_index=False)
    if tool == "polars":
        return read.to_arrow()
    if tool in ("duckdb", "_duckdb"):
        return read.to_arrow_table()
    return read.with_format("arrow")[:] if tool == "datasets" else read


@pytest.fixture
def own_caches(tmp_path, monkeypatch) -> None:
    """What a tool keeps for itself goes away with the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("own_caches")
@pytest.mark.parametrize("lines", [lines for lines, _ in READ], ids=[tool for _, tool in READ])
def test_every_tool_gives_exactly_the_rows_of_the_shards(tmp_path, monkeypatch, lines):
    folder = tmp_path / "demo" / "store"
    write(folder)
    shards = [pq.ParquetFile(path).read() for path in folder.iterdir() if path.is_file()]
    assert len(shards) == 4 and sum(len(shard) for shard in shards) == 28
    expected = ordered([row for shard in shards for row in shard.to_pylist()])
    lie_about(folder)
    monkeypatch.chdir(tmp_path)

    scope: dict[str, Any] = {}
    exec(lines, scope)
    found = arrow_of(scope["rows"], shards[0].schema)
    assert found.column_names == shards[0].column_names
    assert ordered(found.to_pylist()) == expected


def test_every_tool_has_its_lines():
    assert [tool for _, tool in READ] == ["pandas", "pyarrow", "datasets", "polars", "duckdb"]


@pytest.mark.usefixtures("own_caches")
def test_the_glob_does_for_every_tool(tmp_path, monkeypatch):
    """Also in one call for those that take the folder, and where the folder's name could mean a split of a data set."""
    import datasets
    import pandas

    folder = tmp_path / "test" / "validation-data"
    write(folder)
    lie_about(folder)
    monkeypatch.chdir(tmp_path)
    by_glob = datasets.load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train")
    by_folder = datasets.load_dataset("parquet", data_dir=str(folder), split="train")
    expected = sorted(pandas.read_parquet(folder, columns=["path"])["path"])
    assert sorted(by_glob["path"]) == sorted(by_folder["path"]) == expected


# ---------------------------------------------------------------------------------------- current rows and features


@pytest.fixture(params=rows.DTYPES)
def dtype(request) -> str:
    return request.param


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "embeds"


def sql(clause: str) -> list[dict[str, Any]]:
    import duckdb

    with duckdb.connect() as connection:
        result = connection.sql(clause)
        return [dict(zip(result.columns, values, strict=True)) for values in result.fetchall()]


def by_key(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(found, key=lambda row: (row["root"], row["path"], row["part"]))


def test_the_first_clause_gives_the_current_rows(folder):
    write(folder)
    store = open_store(folder)
    assert {row.status for row in store.rows} == {"ok", "failed", "deleted"}
    assert [row.part for row in store.rows if row.path == "clip.mp4"] == [0, 1]
    lie_about(folder)

    found = by_key(sql(ROWS_CLAUSE))
    assert set(found[0]) == {*pq.read_schema(folder / "shard-000002.parquet").names} - {"embeds"}
    for row in found:
        row["grid_thw"] = row["grid_thw"] and tuple(row["grid_thw"])
    assert found == [{name: getattr(row, name) for name in found[0]} for row in store.rows]
    taken = {row["path"]: row["has_features"] for row in found}
    assert taken["refreshed.png"] and not taken["as it was.png"]  # of the later shard, with features or without


def test_the_second_clause_gives_their_features_and_numpy_reads_them(folder, dtype):
    write(folder, dtype)
    store = open_store(folder)
    current = {(row.sha256, row.part) for row in store.rows if row.has_features}
    elsewhere = {row.path for row in store if (row.sha256, row.part) not in current}
    assert elsewhere == {
        "as it was.png",
        "copy of all parts.mp4",
        "copy.png",
        "moved.png",
    }  # in rows that are not current
    stored = [store.features(row).tensors["pooler_output"] for row in store]
    lie_about(folder)

    found = sql(FEATURES_CLAUSE)
    own_rows = zip(store, stored, strict=True)
    expected = [(row.root, row.path, row.part, row.n_tokens, encode(own.raw, dtype)) for row, own in own_rows]
    assert len(found) == 14 and [tuple(row.values()) for row in found] == expected
    for row, own in zip(found, stored, strict=True):
        assert np.array_equal(decoded(row, dtype), own.numpy()), row["path"]


def decoded(row: dict[str, Any], dtype: str) -> np.ndarray:
    """A row's features by the lines of the format page, changed as it says for each dtype."""
    scope: dict[str, Any] = {"np": np, "row": row, "width": rows.WIDTH, "itemsize": 4 if dtype == "float32" else 2}
    if dtype == "int8":
        exec(NUMPY_INT8, scope)
    elif dtype == "bfloat16":
        (line,) = re.findall(r"`(\(raw\.view.*?)`", FORMAT)
        exec(NUMPY.replace('raw.view("<f4")', line), scope)
    else:
        exec(NUMPY.replace("<f4", {"float32": "<f4", "float16": "<f2"}[dtype]), scope)
    return scope["values"]


def test_both_clauses_give_the_same_after_all_that_is_current_was_written_again(folder):
    """As a compaction does that is cut short before it deletes the old shards."""
    write(folder)
    before = by_key(sql(ROWS_CLAUSE)), sql(FEATURES_CLAUSE)
    store = open_store(folder)
    pairs = [(row, store.features(row) if row.status == "ok" else None) for row in store.rows]
    again = [(dataclasses.replace(row, has_features=own is not None), own) for row, own in pairs]
    rows.write_shard(folder, "shard-1000001.parquet", again)
    after = by_key(sql(ROWS_CLAUSE)), sql(FEATURES_CLAUSE)
    assert after[1] == before[1]
    assert [row | {"has_features": None} for row in after[0]] == [row | {"has_features": None} for row in before[0]]


# ------------------------------------------------------------------------------------------------------- live photos


@pytest.mark.parametrize("lines", LIVE_PHOTOS, ids=["duckdb", "pandas", "polars"])
def test_stills_and_their_clips_are_paired(tmp_path, monkeypatch, lines):
    """By folder and name: whole clips and cut ones, of current rows that are ok alone."""
    storage = rows.write_store(
        tmp_path / "demo" / "store",
        [
            rows.item("IMG_1.HEIC"), rows.item("IMG_1.MOV", kind="video"),
            rows.item("x/IMG_1.HEIC"), *rows.parts("x/IMG_1.mov", 3),
            rows.item("IMG_2.HEIC"), rows.item("y/IMG_2.MOV", kind="video"),  # of another folder
            rows.item("IMG_3.HEIC"), rows.item("IMG_3.MOV", kind="video"),
            rows.item("IMG_4.HEIC"), (rows.failed("IMG_4.MOV", kind="video"), None),
            rows.item("v1.5/a"), rows.item("v1.mp4", kind="video"),  # a dot in a folder's name
            rows.item("IMG_1.HEIC", root="/other"), rows.item("IMG_5.mov", kind="video", root="/other"),
        ],
        [(rows.deleted("IMG_3.MOV", kind="video", generation=2), None), rows.item("IMG_5.heic", generation=2, root="/other")],
    )  # fmt: skip
    rows.write_shard(storage, "shard-000003.parquet", [rows.item("IMG_1.HEIC")])  # a rewrite that was cut short
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(lines, scope)
    found = scope["pairs"]
    found = found if isinstance(found, list) else [tuple(pair) for pair in found.to_numpy().tolist()]
    assert sorted(found) == [
        ("/other", "IMG_5.heic", "IMG_5.mov"),
        ("/photos", "IMG_1.HEIC", "IMG_1.MOV"),
        ("/photos", "x/IMG_1.HEIC", "x/IMG_1.mov"),
    ]


def test_an_item_of_another_number_of_parts_has_the_parts_it_has_now(folder):
    """By both clauses: more of them, fewer, none, failed, whole again."""

    def clip(name: str, of: int, generation: int = 1) -> list[rows.Pair]:
        return rows.parts(name, of, generation=generation, sha256=rows.sha(f"{name} {of}"))

    rows.write_store(
        folder,
        [*clip("more.mp4", 2), *clip("fewer.mp4", 4), *clip("whole.mp4", 3), *clip("failed.mp4", 3), *clip("gone.mp4", 2)],
        [
            *clip("more.mp4", 5, 2), *clip("fewer.mp4", 1, 2), rows.item("whole.mp4", kind="video", generation=2),
            (rows.failed("failed.mp4", kind="video", generation=2), None),
            *((deleted_row(row, 2), None) for row, _ in clip("gone.mp4", 2)),
            *rows.without_features(clip("gone.mp4", 2), path="moved.mp4", generation=2),
        ],
    )  # fmt: skip
    store = open_store(folder)
    expected = {"more.mp4": 5, "fewer.mp4": 1, "whole.mp4": 1, "failed.mp4": 1, "gone.mp4": 2, "moved.mp4": 2}
    found = by_key(sql(ROWS_CLAUSE))
    assert collections.Counter(row["path"] for row in found) == expected
    assert [(row["path"], row["part"], row["status"]) for row in found] == [
        (row.path, row.part, row.status) for row in store.rows
    ]
    joined = sql(FEATURES_CLAUSE)
    assert [tuple(row.values()) for row in joined] == [
        (
            row.root,
            row.path,
            row.part,
            row.n_tokens,
            encode(store.features(row).tensors["pooler_output"].raw, "bfloat16"),
        )
        for row in store
    ]
    assert len(joined) == 5 + 1 + 1 + 2
