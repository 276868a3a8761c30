"""A shard is read bit for bit, and damage never passes for data."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qvsplit.errors import ConfigError, QvsplitError, ShardDamaged, StoreDamaged
from qvsplit.store import codec, shard_reader, shard_writer
from qvsplit.store.footer import CHECKSUM_BYTES
from qvsplit.store.shard_reader import Shard
from qvsplit.store.storage import LocalStorage
from tests.support import fuzz, rows

NAME = "shard-000001.parquet"
SECONDS = {"second_per_grid_ts": {"dtype": "float32", "shape": [1], "values": [0.5]}}


def opened(file: Path) -> Shard:
    return Shard(LocalStorage(file.parent), file.name)


def everything(shard: Shard) -> list:
    return [(row, rows.raws(features)) for _, row, features in shard]


@pytest.fixture
def shard_file(tmp_path) -> Path:
    pairs = [rows.item("a.png", 6), (rows.failed("b.png"), None), rows.item("ünï 猫.png", 10)]
    return rows.write_shard(tmp_path, NAME, pairs).path


# ----------------------------------------------------------------------------------------------- written and read


@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("dtype", rows.DTYPES)
def test_rows_and_features_come_back_bit_for_bit(tmp_path, dtype, levels):
    pairs = [rows.item(f"{i}.png", 2 + 2 * i, dtype=dtype, levels=levels) for i in range(5)]
    declared = rows.schema(dtype, levels=levels)
    shard = rows.write_shard(tmp_path, NAME, pairs, declared)
    assert shard.rows == [row for row, _ in pairs]
    assert (shard.schema, shard.config, shard.provenance) == (declared, rows.config(dtype), rows.PROVENANCE)
    for index, (row, features) in enumerate(pairs):
        stored = shard.features(index)
        assert rows.raws(stored) == rows.raws(features)
        assert (stored.config, stored.grid_thw, stored.n_tokens) == (shard.config, row.grid_thw, row.n_tokens)
        assert stored.placeholder == features.placeholder
        assert {stored.tensors[name].width for name in stored} == {rows.WIDTH}
    assert [index for index, _, _ in shard] == list(range(5))


def test_every_column_comes_back(tmp_path):
    clip = rows.row(
        "c.mp4", part=3, start=1.5, end=9.5, generation=1 << 40, kind="video", duration=9.5, version="etag-1",
        taken_at="2020-02-02T02:02:02", warnings="one; two", inputs=json.dumps(SECONDS), media='{"fps": 2}',
        error=None, mtime_ns=-5,
    )  # fmt: skip
    failed = rows.failed("d.png", sha256=None, error_kind="timeout", mtime_ns=None, version=None)
    shard = rows.write_shard(tmp_path, NAME, [(clip, rows.features(6)), (failed, None), (rows.deleted("e"), None)])
    assert shard.rows == [clip, failed, rows.deleted("e")]
    assert shard.features(0).inputs == SECONDS


def test_reading_one_image_reads_a_small_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "ROW_GROUP_BYTES", 1000)
    pairs = [rows.item(f"{i}.png", 20) for i in range(9)]
    shard = rows.write_shard(tmp_path, NAME, pairs)
    assert pq.ParquetFile(tmp_path / NAME).num_row_groups == 5
    read = []
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, group, **more: (read.append(group), real(self, group, **more))[1]
    )
    for index in (8, 0, 5):
        assert rows.raws(shard.features(index)) == rows.raws(pairs[index][1])
    assert read == [4, 0, 2]


TENSORS = ["pooler_output", "deepstack_features_0", "deepstack_features_1"]


@pytest.fixture
def levels_file(tmp_path) -> Path:
    """A shard of three large tensors an image."""
    return rows.write_shard(tmp_path, NAME, [rows.item("a.png", 2000, levels=2)], rows.schema(levels=2)).path


@pytest.mark.parametrize("name", TENSORS)
def test_only_the_columns_of_the_tensors_that_are_named_are_read(levels_file, monkeypatch, name):
    shard = opened(levels_file)
    whole = shard.features(0)
    read: list[int] = []

    class Counted(io.FileIO):
        def read(self, size=-1):
            data = super().read(size)
            read.append(len(data))
            return data

    monkeypatch.setattr(LocalStorage, "open", lambda self, name: Counted(self.folder / name))
    some = shard.features(0, [name])
    assert rows.raws(some) == {name: rows.raws(whole)[name]}
    assert some.left_out == tuple(other for other in TENSORS if other != name) and whole.left_out == ()
    assert (some.placeholder, some.grid_thw, some.n_tokens) == (whole.placeholder, whole.grid_thw, 2000)
    one = len(rows.raws(whole)[name])
    assert 0.5 * one < sum(read) < 1.5 * one
    read.clear()
    shard.features(0)
    assert sum(read) > 1.5 * one


@pytest.mark.parametrize("damaged", TENSORS)
def test_damage_in_a_column_that_is_not_asked_for_is_not_met_and_in_one_that_is_it_is(levels_file, damaged):
    whole = rows.raws(opened(levels_file).features(0))
    data = bytearray(levels_file.read_bytes())
    page = fuzz.anatomy(bytes(data)).page("embeds" if damaged == "pooler_output" else damaged)
    data[page.end - 9] ^= 1
    levels_file.write_bytes(data)
    others = [name for name in TENSORS if name != damaged]
    assert rows.raws(opened(levels_file).features(0, others)) == {name: whole[name] for name in others}
    for names in ([damaged], [damaged, others[0]], None):
        with pytest.raises(ShardDamaged, match=r"features of row 0 \(a\.png\)"):
            opened(levels_file).features(0, names)


def test_tensors_that_are_named_are_checked_as_strictly(tmp_path, levels_file):
    table = pq.read_table(levels_file)
    short, none = (rows.changed(table, "deepstack_features_1", [value]) for value in (b"1234", None))
    shaped = rows.changed(table, "media", [json.dumps({"shapes": {"pooler_output": [7, 8]}})])
    for lie, message in ((short, "has 4 bytes"), (none, "a column without them"), (shaped, "shape")):
        shard = forged(tmp_path / "x.parquet", lie)
        with pytest.raises(ShardDamaged, match=message):
            shard.features(0, ["deepstack_features_1"])
    right = rows.changed(table, "media", [json.dumps({"shapes": {"pooler_output": [2, 1000, rows.WIDTH]}})])
    assert opened(levels_file).features(0, ["deepstack_features_0"]).shapes == {}
    assert forged(tmp_path / "x.parquet", right).features(0, ["deepstack_features_0"]).shapes == {}


def test_a_row_group_that_is_kept_is_read_once_for_each_tensor(levels_file, monkeypatch):
    shard = Shard(LocalStorage(levels_file.parent), NAME, keeps_features=True)
    asked = []
    real = Shard._blobs
    monkeypatch.setattr(
        Shard, "_blobs", lambda self, *given: (asked.append([one.key for one in given[1]]), real(self, *given))[1]
    )
    assert list(shard.features(0, ["pooler_output"])) == ["pooler_output"]
    assert list(shard.features(0)) == TENSORS == list(shard.features(0))
    assert asked == [["pooler_output"], TENSORS[1:], []]


def test_any_parquet_reader_opens_a_shard(shard_file):
    table = pq.read_table(shard_file)
    assert table.column("path").to_pylist() == ["a.png", "b.png", "ünï 猫.png"]
    assert table.column("grid_thw").to_pylist() == [[1, 4, 6], None, [1, 4, 10]]
    assert json.loads(table.schema.metadata[b"qvsplit"])["format"] == 1


def test_a_file_is_open_only_while_it_is_read(tmp_path, shard_file):
    before = len(os.listdir("/proc/self/fd"))
    shards = [opened(shard_file) for _ in range(20)]
    for shard in shards:
        shard.features(0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_row_without_features_of_its_own_has_none(shard_file):
    with pytest.raises(StoreDamaged, match=r"row 1 \(b\.png\) holds no features of its own"):
        opened(shard_file).features(1)


# --------------------------------------------------------------------------------------------------------- damage


def test_pages_carry_checksums(shard_file):
    """Without pyarrow's own verification a flipped byte in a page passes for data; with ours it does not."""
    data = bytearray(shard_file.read_bytes())
    group = pq.ParquetFile(shard_file).metadata.row_group(0)
    column = group.column(group.num_columns - 1)
    assert column.path_in_schema == "embeds"
    data[column.data_page_offset + column.total_compressed_size - 5] ^= 1
    shard_file.write_bytes(data)
    with pytest.raises(ShardDamaged, match=r"shard-000001\.parquet is damaged: features of row 2") as caught:
        opened(shard_file).features(2)
    assert caught.value.path == str(shard_file)
    assert "run `qvsplit extract` again" in str(caught.value)


def test_every_region_of_the_file_is_covered_against_flipped_bytes(shard_file):
    """Bytes of each page header and body, of what lies between, of the footer and its checksum, one at a time."""
    data = shard_file.read_bytes()
    expected = everything(opened(shard_file))
    pages = fuzz.anatomy(data).pages
    places = {*range(8), *range(pages[-1].end, len(data), 61)}
    for page in pages:
        middle = (page.body_at + page.end) // 2
        places |= {*range(page.start, page.body_at, 5), page.body_at, middle, page.end - 1}
    caught = 0
    for place in sorted(places):
        broken = bytearray(data)
        broken[place] ^= 0x55
        shard_file.write_bytes(broken)
        try:
            got = everything(opened(shard_file))
        except QvsplitError:
            caught += 1
        else:
            assert got == expected, f"byte {place} of {len(data)} went unnoticed"
    assert caught > 0.9 * len(places)


def test_a_flipped_byte_in_the_footer_is_caught_wherever_it_is(shard_file):
    data = shard_file.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    thinned = range(start, len(data) - 8, 41)  # test_footer.py has every byte of one
    for place in (*range(start - CHECKSUM_BYTES, start, 3), *thinned, *range(len(data) - 8, len(data))):
        broken = bytearray(data)
        broken[place] ^= 1
        shard_file.write_bytes(broken)
        with pytest.raises(ShardDamaged):
            opened(shard_file)


def test_a_truncated_shard_is_caught_at_any_length(shard_file):
    data = shard_file.read_bytes()
    for length in range(0, len(data), 97):
        shard_file.write_bytes(data[:length])
        with pytest.raises(ShardDamaged):
            opened(shard_file)


@hypothesis_settings(deadline=None, max_examples=60)
@given(st.binary(max_size=3000))
def test_any_bytes_at_all_are_not_a_shard(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("hostile") / "x.parquet"
    file.write_bytes(data)
    with pytest.raises(ShardDamaged):
        opened(file)


def test_a_csv_and_another_parquet_file_are_not_shards(tmp_path):
    (tmp_path / "a.parquet").write_text("path,question\nx,y\n" * 50)
    with pytest.raises(ShardDamaged, match="is not a qvsplit shard: it is not a Parquet file$"):
        opened(tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": list(range(100))}), tmp_path / "b.parquet")
    with pytest.raises(ShardDamaged, match="is not a qvsplit shard: it is a Parquet file without"):
        opened(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(rows.with_checksum(pa.table({"x": [1]})))
    with pytest.raises(ShardDamaged, match="not one that qvsplit wrote"):
        opened(tmp_path / "c.parquet")
    os.mkfifo(tmp_path / "d.parquet")
    with pytest.raises(StoreDamaged, match="not a regular file"):
        opened(tmp_path / "d.parquet")


def test_a_shard_that_no_longer_exists_is_no_damage_of_its_own(shard_file):
    shard = opened(shard_file)
    shard_file.unlink()
    with pytest.raises(StoreDamaged, match="no longer exists") as caught:
        shard.features(0)
    assert not isinstance(caught.value, ShardDamaged)


def test_what_the_system_refuses_is_not_called_damage(shard_file, monkeypatch):
    shard = opened(shard_file)

    def refuse(*args, **kwargs):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(pq, "ParquetFile", refuse)
    with pytest.raises(StoreDamaged, match="cannot be read") as caught:
        shard.features(0)
    assert not isinstance(caught.value, ShardDamaged)
    assert "delete" not in str(caught.value)


def test_a_scale_or_value_that_is_not_finite_is_not_handed_on(tmp_path, monkeypatch):
    for dtype, place in (("int8", slice(rows.WIDTH, None)), ("float32", slice(0, 4))):
        features = rows.features(6, dtype)
        features.tensors["pooler_output"].raw[3, place] = np.array([np.inf], np.float32).view(np.uint8)
        with monkeypatch.context() as patched:
            patched.setattr(codec, "all_finite", lambda *args: True)
            shard = rows.write_shard(tmp_path, f"{dtype}.parquet", [(rows.row(), features)], rows.schema(dtype))
        with pytest.raises(ShardDamaged, match="finite"):
            shard.features(0)


# ------------------------------------------------------------------------------- with the right checksums, and lying


def forged(file: Path, table: pa.Table) -> Shard:
    file.write_bytes(rows.with_checksum(table))
    return opened(file)


def test_a_shard_with_a_right_checksum_that_lies_is_refused(tmp_path, shard_file):
    """Whoever makes a shard by hand can add the checksum: what it says must still hold together."""
    honest = pq.read_table(shard_file)
    text = honest.schema.metadata[b"qvsplit"]

    def described(old: bytes, new: bytes) -> pa.Table:
        assert old in text
        return honest.replace_schema_metadata({b"qvsplit": text.replace(old, new)})

    lies = {
        "tokens": rows.changed(honest, "n_tokens", [7, None, 10]),
        "negative grid": rows.changed(honest, "grid_thw", [[-1, -4, 6], None, [1, 4, 10]]),
        "huge grid": rows.changed(honest, "grid_thw", [[1, 2**30, 2**30], None, [1, 4, 10]]),
        "short": rows.changed(honest, "embeds", [b"1234"]),
        "no features": rows.changed(honest, "embeds", [None]),
        "way out": rows.changed(honest, "path", ["../../etc/passwd"]),
        "placeholder": rows.changed(honest, "placeholder", ['[["<|im_end|>", -1]]']),
        "types": honest.set_column(honest.schema.get_field_index("size"), "size", pa.array(["a", "b", "c"])),
        "columns": honest.drop_columns(["sha256"]),
        "metadata": honest.replace_schema_metadata({b"qvsplit": b"[" * 100_000}),
        "width": described(b'"width": 16', b'"width": -16'),
        "no limits": described(b"min_pixels", b"mun_pixels"),
        "endless": described(b'"merge_size": 2', b'"merge_size": Infinity'),
        "none": honest.replace_schema_metadata(None),
    }
    for name, table in lies.items():
        with pytest.raises(ShardDamaged, match=f"{name}.parquet"):
            list(forged(tmp_path / f"{name}.parquet", table))
    assert len(list(forged(tmp_path / "honest.parquet", honest))) == 3


@pytest.mark.parametrize("name", fuzz.NEWER)
def test_what_only_a_newer_version_knows_is_no_damage(tmp_path, name):
    with pytest.raises(ConfigError, match="was made by a newer qvsplit") as caught:
        list(forged(tmp_path / NAME, fuzz.NEWER[name]()))
    assert caught.value.exit_code == 4
    assert str(tmp_path / NAME) in str(caught.value)


def test_one_level_that_lacks_features_is_damage(tmp_path):
    file = rows.write_shard(tmp_path, NAME, [rows.item("a.png", levels=2)], rows.schema(levels=2)).path
    table = pq.read_table(file)
    for column in ("embeds", "deepstack_features_0", "deepstack_features_1"):
        shard = forged(tmp_path / "x.parquet", rows.changed(table, column, [None]))
        with pytest.raises(ShardDamaged, match="a column without them"):
            shard.features(0)
        with pytest.raises(ShardDamaged, match="say otherwise"):
            list(shard)


def test_a_row_group_claims_no_more_than_a_writer_writes(tmp_path, shard_file, monkeypatch):
    monkeypatch.setattr(shard_reader, "MAX_GROUP_ROWS", 2)
    with pytest.raises(ShardDamaged, match="claims more than any writer puts there"):
        opened(shard_file)


def test_a_shape_that_is_not_tokens_by_width_comes_back(tmp_path):
    row, features = rows.item("a.png", 6, media=json.dumps({"shapes": {"pooler_output": [2, 3, rows.WIDTH]}}))
    shard = rows.write_shard(tmp_path, "shard-000001.parquet", [(row, features)])
    assert shard.features(0).shapes == {"pooler_output": (2, 3, rows.WIDTH)}


@pytest.mark.parametrize(
    "shapes", [{"pooler_output": [7, 8]}, {"nothing": [6]}, {"pooler_output": [0]}, {"pooler_output": 6}, []]
)
def test_a_shape_that_the_features_do_not_have_is_damage(tmp_path, shapes):
    row, features = rows.item("a.png", 6, media=json.dumps({"shapes": shapes}))
    shard = rows.write_shard(tmp_path, "shard-000001.parquet", [(row, features)])
    with pytest.raises(ShardDamaged, match="shape"):
        shard.features(0)
