"""The cache of rows: opening the store opens no shard, and nothing in the cache can make it another store."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest

from qvsplit.errors import ConfigError, StoreDamaged
from qvsplit.store import layout, row_cache
from qvsplit.store.row_cache import open_shards, write_rows
from qvsplit.store.shard_reader import Shard
from qvsplit.store.shards import shards_in
from qvsplit.store.storage import LocalStorage
from qvsplit.store.store import Store, open_store, read_store
from tests.support import fuzz, rows


@pytest.fixture
def storage(tmp_path) -> LocalStorage:
    """A store of two shards, with its cache."""
    storage = rows.write_store(
        tmp_path / "embeds",
        [rows.item("a.png"), rows.item("b.png", 8), (rows.failed("zz.png"), None), rows.item("c.mp4", kind="video")],
        [rows.item("more.png"), (rows.row("copy.png", sha256=rows.sha("a.png"), has_features=False), None)],
    )
    write_rows(storage, shards_in(storage))
    assert (storage.folder / layout.ROWS).exists()
    return storage


def from_shards(storage) -> dict:
    return rows.contents(read_store(storage))


def test_opening_a_store_opens_no_shard(storage, monkeypatch):
    expected, read = from_shards(storage), []
    real = Shard._read_footer
    monkeypatch.setattr(Shard, "_read_footer", lambda self: (read.append(self.name), real(self))[1])
    opened = open_store(storage.folder)
    assert opened.rows == [row for shard in (read_store(storage),) for row in shard.rows]
    read.clear()
    opened = open_store(storage.folder)
    assert len(opened.rows) == 6 and read == []
    assert rows.contents(opened) == expected
    assert sorted(read) == ["shard-000001.parquet", "shard-000002.parquet"]  # each once, for features


def test_it_needs_no_pyarrow(storage):
    code = (
        "import sys; from qvsplit.store.store import open_store; "
        "print(len(open_store(sys.argv[1])), [m for m in ('pyarrow', 'numpy', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(storage.folder)], capture_output=True, text=True, check=True
    )  # fmt: skip
    assert done.stdout == "5 []\n"


def spoil(storage, change) -> None:
    """Change the file's content, and head it with the right hash."""
    path = storage.folder / layout.ROWS
    lines = path.read_bytes().partition(b"\n")[2].split(b"\n")
    name, _, content = lines[0].partition(b"\t")
    record = json.loads(content)
    changed = change(record)
    line = changed if isinstance(changed, bytes) else json.dumps(record).encode()
    payload = b"\n".join([name + b"\t" + line, *lines[1:]])
    path.write_bytes(hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)


def put(name: str, values):
    return lambda record: record["columns"].__setitem__(name, values)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("columns"),
        lambda record: record.pop("schema"),
        lambda record: record["schema"].pop("config"),
        lambda record: record["columns"].pop("media"),
        lambda record: record["columns"]["root"].pop(),
        lambda record: record.update(columns="none"),
        lambda record: record["schema"]["tensors"][0].update(width="wide"),
        lambda record: record["schema"]["config"].update(kernels="quantum"),
        lambda record: b"[" * 100_000,
        put("sha256", ["nonsense"] * 4),
        put("path", ["../../etc/passwd", "b", "c", "d"]),
        put("path", [1, 2, 3, 4]),
        put("n_tokens", [7, 8, None, 6]),
        put("grid_thw", [7, 8, 9, 10]),
        put("status", ["skipped", "ok", "ok", "ok"]),
        put("kind", [[], {}, "image", "image"]),
    ],
)
def test_nonsense_in_it_is_passed_over(storage, change):
    expected = from_shards(storage)
    spoil(storage, change)
    assert rows.contents(open_store(storage.folder)) == expected


@pytest.mark.parametrize("data", [b"", b"\n", b"\xff\xfe", b"0" * 64 + b"\n{}", b"[" * 100_000])
def test_so_is_what_is_no_such_file(storage, data):
    expected = from_shards(storage)
    (storage.folder / layout.ROWS).write_bytes(data)
    assert rows.contents(open_store(storage.folder)) == expected


def test_rows_that_the_shard_does_not_have_are_found_out(storage):
    def add_one(record):
        for column in record["columns"].values():
            column.append(column[0])
        record["columns"]["path"][-1] = "zebra.png"

    spoil(storage, add_one)
    opened = open_store(storage.folder)
    with pytest.raises(StoreDamaged, match="another number of rows"):
        opened.features(next(row for row in opened if row.path == "zebra.png"))


def test_another_width_is_found_out(storage):
    spoil(storage, lambda record: record["schema"]["tensors"][0].update(width=64))
    with pytest.raises(StoreDamaged):
        rows.contents(Store(open_shards(storage, ["shard-000001.parquet"])))


def test_a_shard_that_was_replaced_is_read_itself(storage):
    """Under the same name: only its footer checksum tells."""
    rows.write_shard(storage, "shard-000002.parquet", [rows.item("rocket.jpg")])
    assert "rocket.jpg" in [row.path for row in open_store(storage.folder)]
    assert rows.contents(open_store(storage.folder)) == from_shards(storage)


def test_a_shard_that_changes_after_the_store_was_opened(storage):
    opened = open_store(storage.folder)
    row = next(row for row in opened if row.path == "more.png")
    first, second = (storage.folder / name for name in shards_in(storage))
    second.write_bytes(first.read_bytes())
    with pytest.raises(StoreDamaged, match="no longer the shard"):
        opened.features(row)


def test_a_damaged_footer_is_noticed_on_opening(storage):
    second = storage.folder / "shard-000002.parquet"
    data = bytearray(second.read_bytes())
    data[-20] ^= 1
    second.write_bytes(data)
    with pytest.raises(StoreDamaged):
        open_store(storage.folder)


def test_writing_it_reads_only_shards_that_it_does_not_know(storage, monkeypatch):
    rows.write_shard(storage, "shard-000003.parquet", [rows.item("new.png")])
    opened = []
    monkeypatch.setattr(row_cache, "Shard", lambda where, name: (opened.append(name), Shard(where, name))[1])
    write_rows(storage, shards_in(storage))
    assert opened == ["shard-000003.parquet"]
    assert rows.contents(open_store(storage.folder)) == from_shards(storage)


def test_where_it_cannot_be_written_nothing_is_lost(storage, monkeypatch):
    (storage.folder / layout.ROWS).unlink()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    write_rows(storage, shards_in(storage))
    assert not (storage.folder / layout.ROWS).exists() and storage.list(layout.STAGING) == []
    assert rows.contents(open_store(storage.folder)) == from_shards(storage)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", fuzz.NEWER)
def test_a_shard_that_a_newer_version_wrote_is_not_hidden_by_it(storage, name, known):
    """Neither where the cache does not know it nor where it claims to."""
    (storage.folder / "shard-000003.parquet").write_bytes(fuzz.written(fuzz.NEWER[name]()))
    before = (storage.folder / layout.ROWS).read_bytes()
    write_rows(storage, shards_in(storage))
    assert (storage.folder / layout.ROWS).read_bytes() == before
    if known:
        payload = before.partition(b"\n")[2]
        line = payload.split(b"\n")[0].partition(b"\t")[2].replace(b'"image"', b'"sculpture"')
        heading = row_cache._heading("shard-000003.parquet", row_cache.read_checksum(storage, "shard-000003.parquet"))
        payload += b"\n" + heading + b"\t" + line
        (storage.folder / layout.ROWS).write_bytes(hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)
    with pytest.raises(ConfigError, match=r"shard-000003\.parquet.*made by a newer qvsplit"):
        open_store(storage.folder)
