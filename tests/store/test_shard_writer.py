"""A shard is written whole or not at all, and nothing goes into it that does not belong together."""

from __future__ import annotations

import errno
import os

import numpy as np
import pyarrow.parquet as pq
import pytest

from qvsplit.errors import DiskError
from qvsplit.store import shard_reader, shard_writer
from qvsplit.store.shard_reader import Shard
from qvsplit.store.shard_writer import ShardWriter
from qvsplit.store.storage import LocalStorage
from tests.support import rows

NAME = "shard-000001.parquet"


def files(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def writer(tmp_path):
    return ShardWriter(LocalStorage(tmp_path), NAME, rows.schema())


@pytest.mark.parametrize(
    ("row", "features"),
    [
        (rows.row(n_tokens=7), rows.features(6)),
        (rows.row(grid_thw=(1, 4, 5)), rows.features(6)),
        (rows.row(grid_thw=(1, 4, 8)), rows.features(6)),
        (rows.row(grid_thw=(-1, -4, 6)), rows.features(6)),
        (rows.row(), rows.features(5)),
        (rows.row(), rows.features(6, "float32")),
        (rows.row(), rows.features(6, width=8)),
        (rows.row(), rows.features(6, levels=1)),
        (rows.row(), None),
        (rows.row(has_features=False), rows.features(6)),
        (rows.failed("b.png", has_features=True), rows.features(6)),
        (rows.row(path="../x"), rows.features(6)),
        (rows.row(inputs="x" * 70_000), rows.features(6)),
    ],
)
def test_what_does_not_fit_together_is_never_written(tmp_path, writer, row, features):
    with pytest.raises(ValueError, match=r"tokens|grid|bytes|given|tensors|claims|path|inputs"):
        writer.add(row, features)
    writer.abandon()
    assert files(tmp_path) == []


@pytest.mark.parametrize("key", ["pooler_output", "deepstack_features_1"])
def test_values_that_are_not_finite_are_never_written(tmp_path, key):
    features = rows.features(6, levels=2)
    features.tensors[key].raw[2, 4:6] = [0x80, 0x7F]  # +inf
    writer = ShardWriter(LocalStorage(tmp_path), NAME, rows.schema(levels=2))
    with pytest.raises(ValueError, match="finite"):
        writer.add(rows.row(), features)
    writer.abandon()
    assert files(tmp_path) == []


def test_a_scale_that_is_not_finite_is_never_written(tmp_path):
    features = rows.features(6, "int8")
    features.tensors["pooler_output"].raw[3, rows.WIDTH :] = np.array([np.nan], np.float32).view(np.uint8)
    with pytest.raises(ValueError, match="finite"):
        rows.write_shard(tmp_path, NAME, [(rows.row(), features)], rows.schema("int8"))


def test_a_value_ends_at_two_gibibytes(monkeypatch):
    monkeypatch.setattr(shard_writer, "MAX_VALUE_BYTES", 6 * 32)
    shard_writer.check_features(rows.row(tokens=4), {"embeds": 4 * 32}, rows.specs())
    with pytest.raises(ValueError, match="2 GiB"):
        shard_writer.check_features(rows.row(tokens=6), {"embeds": 6 * 32}, rows.specs())


def test_a_row_of_all_tensors_is_no_more_than_a_reader_takes(tmp_path, monkeypatch):
    assert shard_writer.MAX_ROW_BYTES + shard_reader.MAX_TEXT_BYTES <= shard_reader.MAX_GROUP_BYTES
    monkeypatch.setattr(shard_writer, "MAX_ROW_BYTES", 3 * 6 * 32)
    rows.write_shard(tmp_path, NAME, [rows.item("a.png", 4, levels=2)], rows.schema(levels=2))
    with pytest.raises(ValueError, match=r"has 576 bytes of features, and a row of a shard ends at 3\.75 GiB"):
        rows.write_shard(tmp_path, "b.parquet", [rows.item("a.png", 6, levels=2)], rows.schema(levels=2))
    rows.write_shard(tmp_path, "c.parquet", [rows.item("a.png", 6, levels=1)], rows.schema(levels=1))


def test_a_row_that_is_refused_leaves_the_others(tmp_path, writer):
    writer.add(*rows.item("a.png"))
    with pytest.raises(ValueError, match="tokens"):
        writer.add(rows.row("b.png", n_tokens=7), rows.features(6))
    writer.add(*rows.item("c.png"))
    writer.finish()
    assert [row.path for row in Shard(LocalStorage(tmp_path), NAME).rows] == ["a.png", "c.png"]


def test_a_shard_does_not_exist_before_it_is_finished(tmp_path, writer):
    writer.add(*rows.item("a.png"))
    assert os.listdir(tmp_path) == [".qvsplit"]
    assert all(name.startswith(".qvsplit/staging/.") for name in files(tmp_path))
    size = writer.finish()
    assert files(tmp_path) == [NAME]
    assert size == (tmp_path / NAME).stat().st_size


def test_abandoned_it_leaves_nothing(tmp_path, writer):
    writer.add(*rows.item("a.png"))
    writer.abandon()
    assert files(tmp_path) == []


def test_it_is_synced_before_it_is_renamed_and_the_folder_after(tmp_path, writer, monkeypatch):
    calls = []
    real = {"fsync": os.fsync, "replace": os.replace}
    monkeypatch.setattr(
        os, "fsync", lambda fd: (calls.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"))), real["fsync"](fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("replace", str(b))), real["replace"](a, b)))
    writer.add(*rows.item("a.png"))
    writer.finish()
    (first, file), (second, target), (third, folder) = calls
    assert (first, second, third) == ("fsync", "replace", "fsync")
    assert file.endswith(".tmp")
    assert (target, folder) == (str(tmp_path / NAME), str(tmp_path))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_leaves_nothing_and_says_so(tmp_path, writer, monkeypatch, code):
    writer.add(*rows.item("a.png"))

    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskError, match="full" if code == errno.ENOSPC else "cannot be written"):
        writer.finish()
    writer.abandon()
    assert files(tmp_path) == []


def test_a_disk_that_is_full_from_the_start_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pq, "ParquetWriter", fail)
    with pytest.raises(DiskError, match="full") as kept:  # which keeps frames, and what they hold, alive
        ShardWriter(LocalStorage(tmp_path), NAME, rows.schema())
    assert files(tmp_path) == [], kept


def test_much_that_is_unsynced_is_synced_on_the_way(tmp_path, writer, monkeypatch):
    monkeypatch.setattr(shard_writer, "UNSYNCED_BYTES", 1)
    monkeypatch.setattr(shard_writer, "ROW_GROUP_ROWS", 1)
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), real(fd)))
    for number in range(3):
        writer.add(*rows.item(f"{number}.png"))
    assert len(synced) == 3
    writer.abandon()


def test_row_groups_are_small_by_bytes_and_by_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "ROW_GROUP_BYTES", 1000)
    monkeypatch.setattr(shard_writer, "ROW_GROUP_ROWS", 5)
    pairs = [rows.item(f"{i}.png", 20) for i in range(9)] + [(rows.failed(f"f{i}.png"), None) for i in range(12)]
    rows.write_shard(tmp_path, NAME, pairs)
    assert group_rows(tmp_path / NAME) == [2, 2, 2, 2, 5, 5, 3]
    levels = [rows.item(f"{i}.png", 20, levels=1) for i in range(3)]
    assert group_rows(rows.write_shard(tmp_path, "b.parquet", levels, rows.schema(levels=1)).path) == [1, 1, 1]


def group_rows(file) -> list[int]:
    found = pq.ParquetFile(file).metadata
    return [found.row_group(group).num_rows for group in range(found.num_row_groups)]
