"""Current rows into new shards: order, generation and every bit are kept, and old shards go last."""

from __future__ import annotations

import pytest

from qvsplit.errors import DiskError, ShardDamaged
from qvsplit.store import store_writer
from qvsplit.store.config import Provenance
from qvsplit.store.opening import read_store
from qvsplit.store.rewrite import Rewrite, rewrite
from qvsplit.store.shards import shards_in
from qvsplit.store.storage import LocalStorage
from tests.support import rows
from tests.support.memory_storage import MemoryStorage


def do(storage, *doomed: int, **how):
    with storage.lock() as lock:
        names = frozenset(f"shard-{number:06d}.parquet" for number in doomed)
        return rewrite(storage, read_store(storage), Rewrite(names, **how), lock)


@pytest.fixture
def storage():
    """Three shards: superseded rows, a copy whose features only an old row holds, a clip in parts, and failures."""
    copies = [
        (rows.row("e2.mp4", sha256=rows.sha("e.mp4"), kind="video", part=part, generation=3, has_features=False), None)
        for part in range(2)
    ]
    return rows.write_store(
        MemoryStorage(),
        [rows.item("a.png"), rows.item("b.png", 8), rows.item("c.png"), (rows.failed("f.png"), None)],
        [
            rows.item("b.png", 10, generation=2, sha256=rows.sha("b again")),
            (rows.row("copy.png", sha256=rows.sha("c.png"), generation=2, has_features=False), None),
            (rows.deleted("c.png", generation=2), None),
            *(rows.item("e.mp4", kind="video", part=part, generation=2) for part in range(2)),
        ],
        [rows.item("d.png", generation=3), *copies],
    )


@pytest.mark.parametrize("doomed", [(1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3), ()])
def test_a_reader_finds_the_same_before_and_after(storage, doomed):
    before = rows.contents(read_store(storage))
    done = do(storage, *doomed)
    assert rows.contents(read_store(storage)) == before
    assert (done.shards_before, done.shards_after) == (3, len(shards_in(storage)))
    assert done.bytes_after == sum(file.size for file in storage.list())


@pytest.mark.parametrize("doomed", [(1,), (1, 2), (1, 2, 3)])
def test_and_in_between_while_old_and_new_shards_lie_side_by_side(storage, doomed):
    before = rows.contents(read_store(storage))
    do(storage, *doomed, delete=False)
    assert len(shards_in(storage)) == 4
    assert rows.contents(read_store(storage)) == before
    for number in doomed:  # and while the old ones are deleted one by one
        storage.delete(f"shard-{number:06d}.parquet")
        assert rows.contents(read_store(storage)) == before


def test_what_nobody_needs_is_dropped(storage):
    done = do(storage, 1, 2, 3)
    assert done.rows_dropped == 2  # b's first row, and c's
    (shard,) = read_store(storage).shards
    assert shard.name == "shard-000004.parquet"
    assert [row.path for row in shard.rows] == [
        "a.png",
        "copy.png",
        "f.png",
        "b.png",
        "c.png",
        "e.mp4",
        "e.mp4",
        "d.png",
        "e2.mp4",
        "e2.mp4",
    ]
    assert [row.generation for row in shard.rows] == [1, 2, 1, 2, 2, 2, 2, 3, 3, 3]
    assert next(row for row in shard.rows if row.path == "copy.png").has_features


def test_named_tensors_are_copied_bit_for_bit():
    for dtype in rows.DTYPES:
        pairs = [rows.item(f"{n}.png", 2 + 2 * n, dtype=dtype, levels=3) for n in range(4)]
        declared = rows.schema(dtype, levels=3)
        storage = rows.write_store(MemoryStorage(), pairs[:2], pairs[2:], declared=declared)
        do(storage, 1, 2)
        (shard,) = read_store(storage).shards
        assert shard.schema == declared
        assert [rows.raws(features) for _, _, features in shard] == [rows.raws(features) for _, features in pairs]


def test_provenance_of_all_old_shards_is_kept_once_each(storage):
    made = [Provenance("m", None, device, {"torch": version}) for device, version in
            (("cpu", "1"), ("cuda", "1"), ("cpu", "1"), ("cpu", "2"))]  # fmt: skip
    storage = MemoryStorage()
    for number, one in enumerate(made, 1):
        declared = rows.schema(provenance=[one])
        rows.write_shard(storage, f"shard-{number:06d}.parquet", [rows.item(f"{number}.png")], declared)
    do(storage, 1, 2, 3, 4)
    (shard,) = read_store(storage).shards
    assert shard.schema.provenance == (made[0], made[1], made[3])
    rows.write_shard(storage, "shard-000009.parquet", [rows.item("x.png")], rows.schema(provenance=[made[1]]))
    do(storage, 5, 9)
    assert {one.id for one in read_store(storage).shards[0].schema.provenance} == {one.id for one in made}


def test_items_to_drop_are_not_written(storage):
    do(storage, 1, 2, 3, drop=frozenset({("/photos", "a.png"), ("/photos", "e.mp4")}))
    assert [row.path for row in read_store(storage).rows] == [
        "b.png", "c.png", "copy.png", "d.png", "e2.mp4", "e2.mp4", "f.png",
    ]  # fmt: skip


def test_features_that_cannot_be_read_stop_it_or_are_told(tmp_path):
    storage = rows.write_store(tmp_path, [rows.item("a.png")], [rows.item("b.png", 20)])
    file = tmp_path / "shard-000002.parquet"
    data = bytearray(file.read_bytes())
    where = read_store(storage).shards[1]
    chunk = where._chunks[0][-1]
    data[chunk.start + chunk.length - 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ShardDamaged):
        do(storage, 1, 2)
    assert shards_in(storage) == ["shard-000001.parquet", "shard-000002.parquet"]
    lost = []
    do(storage, 1, 2, on_lost=lost.append)
    assert [row.path for row in lost] == ["b.png"]
    store = read_store(storage)
    assert [(row.path, row.has_features) for row in store.rows] == [("a.png", True), ("b.png", False)]


def test_a_full_disk_keeps_the_old_shards(storage, tmp_path, monkeypatch):
    storage = rows.write_store(tmp_path, *([rows.item(f"{n}.png")] for n in range(3)))
    before = rows.contents(read_store(storage))
    monkeypatch.setattr(store_writer, "SHARD_ROWS", 1)
    monkeypatch.setattr("os.replace", fails_after(2))
    with pytest.raises(DiskError, match="full"):
        do(storage, 1, 2, 3)
    assert shards_in(storage)[:3] == [f"shard-{number:06d}.parquet" for number in (1, 2, 3)]
    assert rows.contents(read_store(LocalStorage(tmp_path))) == before


def fails_after(times: int):
    import os

    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) > times:
            raise OSError(28, "No space left on device")
        real(source, target)

    return replace
