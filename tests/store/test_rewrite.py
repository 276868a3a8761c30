"""Current rows into new shards: order, generation and every bit are kept, and old shards go last."""

from __future__ import annotations

import functools
import itertools

import pytest

from qvsplit.errors import DiskError, ShardDamaged
from qvsplit.store import opening, store_writer
from qvsplit.store import store as store_module
from qvsplit.store.config import Provenance
from qvsplit.store.opening import read_store
from qvsplit.store.rewrite import Rewrite, rewrite
from qvsplit.store.row import deleted_row
from qvsplit.store.shard_reader import Shard
from qvsplit.store.shards import shards_in
from qvsplit.store.storage import LocalStorage
from tests.support import rows
from tests.support.every_model import further
from tests.support.memory_storage import MemoryStorage


def do(storage, *doomed: int, **how):
    with storage.lock() as lock:
        names = frozenset(f"shard-{number:06d}.parquet" for number in doomed)
        return rewrite(storage, read_store(storage), Rewrite(names, **how), lock)


@pytest.fixture
def storage():
    """Three shards: superseded rows, a copy whose features only an old row holds, a clip in parts, and failures."""
    clip = rows.parts("e.mp4", 2, generation=2)
    copies = rows.without_features(clip, path="e2.mp4", generation=3)
    return rows.write_store(
        MemoryStorage(),
        [rows.item("a.png"), rows.item("b.png", 8), rows.item("c.png"), (rows.failed("f.png"), None)],
        [
            rows.item("b.png", 10, generation=2, sha256=rows.sha("b again")),
            (rows.row("copy.png", sha256=rows.sha("c.png"), generation=2, has_features=False), None),
            (rows.deleted("c.png", generation=2), None),
            *clip,
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


# ----------------------------------------------------------------------------------------------- items of several parts


@pytest.fixture
def clips():
    """Videos in parts whose features and rows are spread over shards as badly as can be.

    `lost.mp4` was deleted and has two copies, of which `copy.mp4` is the first; the features of its parts lie in two
    shards, as a quarantined one in between left them. `again.mp4` was cut into three parts and is now another file of
    two. `both.mp4` and `twin.mp4` show the same bytes.
    """
    lost, both = rows.parts("lost.mp4", 4), rows.parts("both.mp4", 3)
    deleted = [(deleted_row(row, 2), None) for row, _ in lost]
    return rows.write_store(
        MemoryStorage(),
        [*lost[:2], *rows.parts("again.mp4", 3), rows.item("a.png")],
        [*lost[2:], *rows.without_features(both, path="twin.mp4")],
        [
            *rows.without_features(lost, path="copy.mp4", generation=2),
            *rows.parts("again.mp4", 2, generation=2, sha256=rows.sha("again, another")),
            *deleted,
        ],
        [*both, *rows.without_features(lost, path="third.mp4", generation=3), rows.item("z.png", generation=3)],
    )


def shards_of_items(store) -> dict[str, set[str]]:
    """In which shards the rows of each item with parts lie that are current."""
    found: dict[str, set[str]] = {}
    for number, entry in enumerate(store.catalogue.shards, 1):
        for index, (_, path) in store.catalogue.current_places(number).items():
            if store.shards[number - 1].rows[index].is_part:
                found.setdefault(path, set()).add(entry.name)
    return found


EVERY_CHOICE = [choice for size in range(1, 5) for choice in itertools.combinations((1, 2, 3, 4), size)]


@pytest.mark.parametrize(
    ("shard_rows", "item_bytes"),
    [
        (1, 0),
        (2, 1 << 20),
        (1000, 0),
        pytest.param(1, 1 << 20, marks=further),
        pytest.param(2, 0, marks=further),
        pytest.param(1000, 1 << 20, marks=further),
    ],
)
@pytest.mark.parametrize("doomed", EVERY_CHOICE, ids=str)
def test_parts_stay_together_with_their_features(clips, monkeypatch, doomed, shard_rows, item_bytes):
    monkeypatch.setattr(store_writer, "SHARD_ROWS", shard_rows)
    monkeypatch.setattr(store_writer, "ITEM_BYTES", item_bytes)
    opened = functools.cache(Shard)  # no name is given twice: footer and rows of each are read once
    for module in (opening, store_module):
        monkeypatch.setattr(module, "Shard", opened)
    before = rows.contents(read_store(clips))
    do(clips, *doomed, delete=False)
    assert rows.contents(read_store(clips)) == before
    for number in doomed:  # and while the old ones are deleted one by one
        clips.delete(f"shard-{number:06d}.parquet")
        store = read_store(clips)
        assert rows.contents(store) == before
    found = shards_of_items(store)
    assert sorted(found) == ["again.mp4", "both.mp4", "copy.mp4", "lost.mp4", "third.mp4", "twin.mp4"]
    assert all(len(names) == 1 for names in found.values()), found
    for name in ("lost.mp4", "both.mp4"):
        assert store.holds((rows.sha(name), 0))
    homes = [row.content for shard in store.shards for row in shard.rows if row.has_features]
    assert len(homes) == len(set(homes))  # nothing twice


def test_each_item_is_written_once_and_what_nobody_needs_is_dropped(clips):
    current = len(read_store(clips).rows)
    assert do(clips, 1, 2, 3, 4).rows_dropped == 4 + 3  # lost.mp4 and again.mp4 as they were
    (shard,) = read_store(clips).shards
    names = [row.name for row in shard.rows]
    assert len(names) == len(set(names)) == current
    held = {row.path for row in shard.rows if row.has_features and row.is_part}
    assert held == {"again.mp4", "both.mp4", "copy.mp4"}  # copies hold what only a deleted name held


def test_dropped_items_leave_those_that_show_the_same_bytes(clips):
    keep = {key: held for key, held in rows.contents(read_store(clips)).items()
            if key[1] not in ("copy.mp4", "lost.mp4", "both.mp4")}  # fmt: skip
    do(clips, 1, 2, 3, 4, drop=frozenset(("/photos", name) for name in ("copy.mp4", "lost.mp4", "both.mp4")))
    assert rows.contents(read_store(clips)) == keep


def test_of_an_item_one_part_of_which_is_lost_the_others_are_saved(tmp_path, monkeypatch):
    monkeypatch.setattr("qvsplit.store.shard_writer.ROW_GROUP_ROWS", 1)
    storage = rows.write_store(tmp_path, rows.parts("c.mp4", 3))
    shard = read_store(storage).shards[0]
    chunk = shard._chunks[1][-1]
    data = bytearray((tmp_path / shard.name).read_bytes())
    data[chunk.start + chunk.length - 5] ^= 1
    (tmp_path / shard.name).write_bytes(data)
    lost = []
    do(storage, 1, on_lost=lost.append)
    assert [row.name for row in lost] == ["c.mp4#1"]
    store = read_store(storage)
    assert [row.has_features for row in store.rows] == [True, False, True]
    assert not store.holds((rows.sha("c.mp4"), 0))  # it is encoded again


def test_parts_that_another_writer_left_out_are_no_reason_to_stop():
    clip = rows.parts("c.mp4", 3)
    storage = rows.write_store(MemoryStorage(), [clip[0], clip[2]], [rows.item("a.png")])
    before = rows.contents(read_store(storage))
    do(storage, 1, 2)
    assert rows.contents(read_store(storage)) == before


def test_what_any_shard_says_of_videos_the_new_one_says(tmp_path):
    videos = rows.schema(config=rows.config(videos=rows.VIDEOS))
    for order in ((None, videos), (videos, None)):
        storage = MemoryStorage()
        for number, declared in enumerate(order, 1):
            pairs = rows.parts("c.mp4", 2) if declared else [rows.item("a.png")]
            rows.write_shard(storage, f"shard-{number:06d}.parquet", pairs, declared)
        do(storage, 1, 2)
        assert read_store(storage).shards[0].config == videos.config
