"""Format 1: written and read bit for bit, whole or not at all, and damage never passes for data."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qvsplit import store
from qvsplit.album import open_album
from qvsplit.errors import AlbumDamaged, DiskError, QvsplitError, RecipeError
from qvsplit.recipe import PICTURE_POLICY, Made, Recipe
from qvsplit.store import Row, Shard, ShardWriter

HIDDEN = 16
MADE = Made("some/model", None, "cpu", {"torch": "2"})


def recipe(dtype: str = "bfloat16") -> Recipe:
    processor = {"merge_size": 2, "min_pixels": 3136, "max_pixels": 1003520}
    return Recipe("qwen2_vl", "0" * 64, processor, "float32", dtype, PICTURE_POLICY)


def values(n_tokens: int, dtype: str, seed: int = 0) -> np.ndarray:
    """Finite values as their bytes, [n_tokens, HIDDEN · itemsize]."""
    floats = np.random.default_rng(seed).standard_normal((n_tokens, HIDDEN)).astype(np.float32)
    words = {
        "float32": floats,
        "float16": floats.astype(np.float16),
        "bfloat16": (floats.view(np.uint32) >> 16).astype(np.uint16),
    }
    return words[dtype].view(np.uint8).reshape(n_tokens, -1)


def row(name: str = "a.png", tokens: int = 6, **changes) -> Row:
    whole = Row(
        root="/photos", path=name, sha256=hashlib.sha256(name.encode()).digest(), size=10, mtime_ns=5, kind="image",
        width=84, height=56, status="ok", error=None, grid_thw=(1, 4, tokens), n_tokens=tokens, has_embeds=True,
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)


FAILED = {
    "status": "failed",
    "error": "is empty",
    "grid_thw": None,
    "n_tokens": None,
    "has_embeds": False,
    "width": None,
}


def write(path: Path, *rows: tuple[Row, np.ndarray | None], dtype: str = "bfloat16") -> Path:
    writer = ShardWriter(path, recipe=recipe(dtype), made=MADE, hidden_size=HIDDEN)
    for one, raw in rows:
        writer.add(one, raw)
    writer.finish()
    return path


@pytest.fixture
def shard_file(tmp_path) -> Path:
    return write(
        tmp_path / "shard-000001.parquet",
        (row("a.png", 6), values(6, "bfloat16", 1)),
        (row("b.png", 2, **FAILED), None),
        (row("ünï 猫.png", 10), values(10, "bfloat16", 2)),
    )


# ---------------------------------------------------------------------------------------------------------- codec


@given(st.binary(max_size=400), st.sampled_from([1, 2, 4]))
def test_planes_come_back(data, itemsize):
    raw = np.frombuffer(data[: len(data) // itemsize * itemsize], np.uint8)
    assert np.array_equal(store.from_planes(store.to_planes(raw, itemsize), itemsize), raw)


def test_the_most_significant_bytes_come_first():
    assert store.to_planes(np.array([0x0102, 0x0304], "<u2").view(np.uint8), 2) == bytes([1, 3, 2, 4])
    assert store.to_planes(np.array([0x01020304, 0x05060708], "<u4").view(np.uint8), 4) == bytes(
        [1, 5, 2, 6, 3, 7, 4, 8]
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_value_that_is_not_finite_is_seen(dtype, bad):
    raw = values(3, dtype).copy()
    itemsize = store.DTYPE_BYTES[dtype]
    assert store.all_finite(store.to_planes(raw, itemsize), dtype)
    floats = np.array([bad], np.float32)
    word = {
        "float32": floats,
        "float16": floats.astype(np.float16),
        "bfloat16": (floats.view(np.uint32) >> 16).astype(np.uint16),
    }
    raw[1, 3 * itemsize : 4 * itemsize] = word[dtype].view(np.uint8)
    assert not store.all_finite(store.to_planes(raw, itemsize), dtype)


# ----------------------------------------------------------------------------------------------- written and read


def int8(n_tokens: int, seed: int = 0) -> np.ndarray:
    """Whole numbers, and a scale behind each token's: [n_tokens, HIDDEN + 4]."""
    rng = np.random.default_rng(seed)
    whole = rng.integers(-127, 128, (n_tokens, HIDDEN)).astype(np.int8).view(np.uint8)
    return np.concatenate([whole, rng.random((n_tokens, 1), np.float32).view(np.uint8)], axis=1)


def test_int8_comes_back_bit_for_bit(tmp_path):
    rows = [(row(f"{i}.png", 2 + 2 * i), int8(2 + 2 * i, i)) for i in range(5)]
    shard = Shard(write(tmp_path / "s.parquet", *rows, dtype="int8"))
    for index, (_, raw) in enumerate(rows):
        stored = shard.embeds(index)
        assert np.array_equal(stored.raw, raw)
        assert (stored.hidden_size, stored.dtype) == (HIDDEN, "int8")
        expected = raw[:, :HIDDEN].view(np.int8).astype(np.float32) * raw[:, HIDDEN:].copy().view(np.float32)
        assert np.array_equal(stored.numpy(), expected)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_scale_that_is_not_finite_is_neither_written_nor_read(tmp_path, bad, monkeypatch):
    raw = int8(6)
    raw[3, HIDDEN:] = np.array([bad], np.float32).view(np.uint8)
    with pytest.raises(ValueError, match="finite"):
        write(tmp_path / "a.parquet", (row(), raw), dtype="int8")
    with monkeypatch.context() as patched:
        patched.setattr(store, "all_finite", lambda *args: True)
        write(tmp_path / "b.parquet", (row(), raw), dtype="int8")
    with pytest.raises(AlbumDamaged, match="finite"):
        Shard(tmp_path / "b.parquet").embeds(0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_come_back_bit_for_bit(tmp_path, dtype):
    rows = [(row(f"{i}.png", 2 + 2 * i), values(2 + 2 * i, dtype, i)) for i in range(5)]
    shard = Shard(write(tmp_path / "s.parquet", *rows, dtype=dtype))
    assert shard.rows == [one for one, _ in rows]
    assert (shard.recipe, shard.made, shard.hidden_size) == (recipe(dtype), MADE, HIDDEN)
    for index, (one, raw) in enumerate(rows):
        stored = shard.embeds(index)
        assert np.array_equal(stored.raw, raw)
        assert (stored.grid_thw, stored.n_tokens, stored.hidden_size) == (one.grid_thw, one.n_tokens, HIDDEN)
    assert [index for index, _, _ in shard] == list(range(5))


def test_reading_one_picture_reads_a_small_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROW_GROUP_BYTES", 1000)
    rows = [(row(f"{i}.png", 20), values(20, "bfloat16", i)) for i in range(9)]
    shard = Shard(write(tmp_path / "s.parquet", *rows))
    assert pq.ParquetFile(tmp_path / "s.parquet").num_row_groups == 5
    for index in (8, 0, 5):
        assert np.array_equal(shard.embeds(index).raw, rows[index][1])


def test_any_parquet_reader_opens_a_shard(shard_file):
    table = pq.read_table(shard_file)
    assert table.column("path").to_pylist() == ["a.png", "b.png", "ünï 猫.png"]
    assert table.column("grid_thw").to_pylist() == [[1, 4, 6], None, [1, 4, 10]]
    assert json.loads(table.schema.metadata[b"qvsplit"])["recipe"]["format"] == 1


def test_pages_carry_checksums(shard_file):
    """Without pyarrow's own verification a flipped byte in a page passes for data; with ours it does not."""
    data = bytearray(shard_file.read_bytes())
    column = pq.ParquetFile(shard_file).metadata.row_group(0).column(13)
    assert column.path_in_schema == "embeds"
    data[column.data_page_offset + column.total_compressed_size - 5] ^= 1
    shard_file.write_bytes(data)
    with pytest.raises(AlbumDamaged, match=r"shard-000001\.parquet.*column embeds of row 2"):
        Shard(shard_file).embeds(2)


@pytest.mark.parametrize(
    ("changes", "raw"),
    [({"n_tokens": 7}, values(6, "bfloat16")), ({"grid_thw": (1, 4, 5)}, values(6, "bfloat16")),
     ({"grid_thw": (1, 4, 8)}, values(6, "bfloat16")), ({}, values(5, "bfloat16")), ({}, values(6, "float32")),
     ({"grid_thw": (-1, -4, 6)}, values(6, "bfloat16")), ({}, None), ({"has_embeds": False}, values(6, "bfloat16"))],
)  # fmt: skip
def test_what_does_not_fit_together_is_never_written(tmp_path, changes, raw):
    writer = ShardWriter(tmp_path / "s.parquet", recipe=recipe(), made=MADE, hidden_size=HIDDEN)
    with pytest.raises(ValueError, match=r"tokens|grid|bytes|given"):
        writer.add(row(**changes), raw)
    writer.abandon()


def test_values_that_are_not_finite_are_never_written(tmp_path):
    raw = values(6, "bfloat16").copy()
    raw[2, 4:6] = [0x80, 0x7F]  # +inf
    writer = ShardWriter(tmp_path / "s.parquet", recipe=recipe(), made=MADE, hidden_size=HIDDEN)
    with pytest.raises(ValueError, match="finite"):
        writer.add(row(), raw)
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------- whole or not at all


def test_a_shard_is_not_there_before_it_is_finished(tmp_path):
    writer = ShardWriter(tmp_path / "shard-000001.parquet", recipe=recipe(), made=MADE, hidden_size=HIDDEN)
    writer.add(row(), values(6, "bfloat16"))
    assert all(name.startswith(".") for name in os.listdir(tmp_path))
    writer.finish()
    assert os.listdir(tmp_path) == ["shard-000001.parquet"]


def test_it_is_synced_before_it_is_renamed_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    real = {"fsync": os.fsync, "rename": os.rename}
    monkeypatch.setattr(
        os, "fsync", lambda fd: (calls.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"))), real["fsync"](fd))
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append(("rename", str(b))), real["rename"](a, b)))
    write(tmp_path / "shard-000001.parquet", (row(), values(6, "bfloat16")))
    (first, file), (second, target), (third, folder) = calls
    assert (first, second, third) == ("fsync", "rename", "fsync")
    assert file.endswith(".tmp")
    assert (target, folder) == (str(tmp_path / "shard-000001.parquet"), str(tmp_path))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_leaves_nothing_and_says_so(tmp_path, monkeypatch, code):
    writer = ShardWriter(tmp_path / "s.parquet", recipe=recipe(), made=MADE, hidden_size=HIDDEN)
    writer.add(row(), values(6, "bfloat16"))

    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskError, match="full" if code == errno.ENOSPC else "cannot be written"):
        writer.finish()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------- damage


def test_every_flipped_byte_is_caught_or_harmless(shard_file):
    """Each byte of a shard, one at a time: an error of ours, or the very rows that were written."""
    data = shard_file.read_bytes()
    original = Shard(shard_file)
    expected = [(one, None if e is None else e.raw.tobytes()) for _, one, e in original]
    caught = 0
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 0x55
        shard_file.write_bytes(broken)
        try:
            got = [(one, None if e is None else e.raw.tobytes()) for _, one, e in Shard(shard_file)]
        except QvsplitError:
            caught += 1
        else:
            assert got == expected, f"byte {place} of {len(data)} went unnoticed"
    assert caught > 0.9 * len(data)


def test_a_flipped_byte_in_the_footer_is_caught_wherever_it_is(shard_file):
    data = shard_file.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    for place in range(len(data) - 8 - length - store.SEAL_BYTES, len(data)):
        broken = bytearray(data)
        broken[place] ^= 1
        shard_file.write_bytes(broken)
        with pytest.raises(AlbumDamaged):
            Shard(shard_file)


def test_a_truncated_shard_is_caught_at_any_length(shard_file):
    data = shard_file.read_bytes()
    for length in range(0, len(data), 97):
        shard_file.write_bytes(data[:length])
        with pytest.raises(AlbumDamaged):
            Shard(shard_file)


@hypothesis_settings(deadline=None, max_examples=150)
@given(st.binary(max_size=3000))
def test_any_bytes_at_all_are_not_a_shard(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("hostile") / "x.parquet"
    file.write_bytes(data)
    with pytest.raises(AlbumDamaged):
        Shard(file)


def test_a_csv_and_another_parquet_file_are_not_shards(tmp_path):
    (tmp_path / "a.parquet").write_text("path,question\nx,y\n" * 50)
    with pytest.raises(AlbumDamaged, match="is not a qvsplit shard: it is not a Parquet file$"):
        Shard(tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": list(range(100))}), tmp_path / "b.parquet")
    with pytest.raises(AlbumDamaged, match="is not a qvsplit shard: it is a Parquet file without"):
        Shard(tmp_path / "b.parquet")
    os.mkfifo(tmp_path / "c.parquet")
    with pytest.raises(AlbumDamaged, match="not a regular file"):
        Shard(tmp_path / "c.parquet")


def test_what_the_system_refuses_is_not_called_damage(shard_file, monkeypatch):
    shard = Shard(shard_file)

    def refuse(*args, **kwargs):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(pq, "ParquetFile", refuse)
    with pytest.raises(AlbumDamaged, match="cannot be read") as caught:
        shard.embeds(0)
    assert "delete" not in str(caught.value)


def sealed(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path, write_page_checksum=True)
    with path.open("r+b") as stream:
        store._seal(stream)
    return path


def test_a_sealed_shard_that_lies_is_refused(tmp_path, shard_file):
    """Whoever makes a shard by hand can seal it: what it says must still hold together."""
    honest = pq.read_table(shard_file)

    def column(name, content):
        return honest.set_column(
            honest.schema.get_field_index(name), name, pa.array(content, honest.schema.field(name).type)
        )

    lies = {
        "tokens": column("n_tokens", [7, None, 10]),
        "negative grid": column("grid_thw", [[-1, -4, 6], None, [1, 4, 10]]),
        "huge grid": column("grid_thw", [[1, 2**30, 2**30], None, [1, 4, 10]]),
        "short": column("embeds", [b"1234", None, honest.column("embeds")[2].as_py()]),
        "no embeds": column("embeds", [None, None, honest.column("embeds")[2].as_py()]),
        "way out": column("path", ["../../etc/passwd", "b.png", "c.png"]),
        "status": column("status", ["fine", "failed", "ok"]),
        "types": honest.set_column(3, "size", pa.array(["a", "b", "c"])),
        "columns": honest.drop_columns(["sha256"]),
        "metadata": honest.replace_schema_metadata({b"qvsplit": b"[" * 100_000}),
        "width": honest.replace_schema_metadata(
            {b"qvsplit": honest.schema.metadata[b"qvsplit"].replace(b": 16", b": -16")}
        ),
        "no limits": honest.replace_schema_metadata(
            {b"qvsplit": honest.schema.metadata[b"qvsplit"].replace(b"min_pixels", b"mun_pixels")}
        ),
        "endless": honest.replace_schema_metadata(
            {b"qvsplit": honest.schema.metadata[b"qvsplit"].replace(b'"merge_size": 2', b'"merge_size": Infinity')}
        ),
        "none": honest.replace_schema_metadata(None),
    }
    for name, table in lies.items():
        with pytest.raises(AlbumDamaged):
            list(Shard(sealed(tmp_path / f"{name}.parquet", table)))
    assert len(list(Shard(sealed(tmp_path / "honest.parquet", honest)))) == 3


def test_a_newer_format_says_upgrade(tmp_path, shard_file):
    table = pq.read_table(shard_file)
    newer = json.loads(table.schema.metadata[b"qvsplit"])
    newer["recipe"]["format"] = 2
    path = sealed(tmp_path / "newer.parquet", table.replace_schema_metadata({b"qvsplit": json.dumps(newer)}))
    with pytest.raises(RecipeError, match=r"format 2.*upgrade"):
        Shard(path)


def test_a_folder_whose_name_is_not_utf_8(tmp_path, album_folder):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/d\xff")
    shutil.copytree(album_folder, folder)
    album = open_album(folder)
    assert len(album) == len(open_album(album_folder))
    assert all(len(album.embeds(row).numpy()) == row.n_tokens for row in album)
