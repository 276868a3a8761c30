"""Damaged shards are quarantined, what is sound in them is saved; a newer version's shards are left alone."""

from __future__ import annotations

import pytest

from qvsplit.errors import ConfigError, ShardDamaged
from qvsplit.store import layout
from qvsplit.store.opening import read_store
from qvsplit.store.repair import RepairNotes, clear_marks, damage_marks, mark_damage, repair
from qvsplit.store.shards import shards_in
from qvsplit.store.storage import LocalStorage
from tests.support import fuzz, rows
from tests.support.memory_storage import MemoryStorage


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path):
    where = LocalStorage(tmp_path / "store") if request.param == "local" else MemoryStorage()
    return rows.write_store(where, [rows.item("a.png")], [rows.item("b.png"), rows.item("c.png")], [rows.item("d.png")])


def read(storage, name: str) -> bytes:
    with storage.open(name) as stream:
        return stream.read()


def put(storage, name: str, data: bytes) -> None:
    with storage.put_whole(name) as stream:
        stream.write(data)


def spoil(storage, name: str, place: int) -> None:
    data = bytearray(read(storage, name))
    data[place] ^= 0x55
    put(storage, name, bytes(data))


def spoil_features(storage, shard: int, index: int) -> None:
    """Flip a byte in the features of one row, in a row group of its own."""
    opened = read_store(storage).shards[shard]
    chunk = opened._chunks[index][-1]
    spoil(storage, opened.name, chunk.start + chunk.length - 5)


def repaired(storage, **options):
    notes: list[str] = []
    with storage.lock() as lock:
        store, number = repair(storage, lock, RepairNotes(notes.append), **({"model_named": False} | options))
    return store, number, notes


def everything(storage) -> dict:
    folders = ("", layout.QUARANTINE, layout.DAMAGE)
    return {(folder, file.name): read(storage, f"{folder}/{file.name}".lstrip("/"))
            for folder in folders for file in storage.list(folder)}  # fmt: skip


def test_where_nothing_is_damaged_nothing_is_changed(storage):
    before = everything(storage)
    store, number, notes = repaired(storage)
    assert (number, notes) == (0, [])
    assert rows.contents(store) == rows.contents(read_store(storage))
    assert everything(storage) == before


def test_a_shard_that_does_not_open_is_quarantined_as_it_is(storage):
    spoil(storage, "shard-000002.parquet", -20)
    data = read(storage, "shard-000002.parquet")
    store, number, notes = repaired(storage)
    assert number == 1
    assert [row.path for row in store] == ["a.png", "d.png"]
    assert shards_in(storage) == ["shard-000001.parquet", "shard-000003.parquet"]
    assert read(storage, f"{layout.QUARANTINE}/shard-000002.parquet") == data
    assert len(notes) == 1
    for part in ("shard-000002.parquet is damaged", "footer checksum", "quarantined", "encoded again"):
        assert part in notes[0]


def test_quarantined_shards_of_one_name_are_all_kept(storage):
    for round_ in range(3):
        put(storage, "shard-000009.parquet", b"no shard %d" % round_)
        repaired(storage)
    assert [read(storage, f"{layout.QUARANTINE}/{file.name}") for file in storage.list(layout.QUARANTINE)] == [
        b"no shard 0", b"no shard 1", b"no shard 2",
    ]  # fmt: skip


def test_what_is_sound_in_a_marked_shard_is_saved(monkeypatch, storage):
    monkeypatch.setattr("qvsplit.store.shard_writer.ROW_GROUP_ROWS", 1)
    rows.write_shard(storage, "shard-000002.parquet", [rows.item("b.png"), rows.item("c.png")])
    spoil_features(storage, 1, 1)
    data = read(storage, "shard-000002.parquet")
    with pytest.raises(ShardDamaged) as caught:
        list(read_store(storage).shards[1])
    assert mark_damage(storage, "shard-000002.parquet", caught.value.what)
    store, number, notes = repaired(storage)
    assert number == 1 and "but for what is sound in it" in notes[0]
    assert [(row.path, store.home(row.content) is not None) for row in store] == [
        ("a.png", True), ("b.png", True), ("c.png", False), ("d.png", True),
    ]  # fmt: skip
    assert rows.raws(store.features(store.current("/photos", "b.png"))) == rows.raws(rows.item("b.png")[1])
    assert read(storage, f"{layout.QUARANTINE}/shard-000002.parquet") == data
    assert storage.list(layout.DAMAGE) == []


def test_a_mark_counts_only_for_the_very_shard_it_was_made_of(storage):
    assert mark_damage(storage, "shard-000002.parquet", "features of row 0")
    assert damage_marks(storage)["shard-000002.parquet"].what == "features of row 0"
    rows.write_shard(storage, "shard-000002.parquet", [rows.item("other.png")])  # replaced since
    assert repaired(storage)[1] == 0
    assert damage_marks(storage) == {}


def test_marks_of_shards_that_do_not_exist_are_deleted_and_nonsense_is_passed_over(storage):
    put(storage, f"{layout.DAMAGE}/shard-000077.parquet.json", b"{}")
    put(storage, f"{layout.DAMAGE}/shard-000001.parquet.json", b"[" * 100_000)
    put(storage, f"{layout.DAMAGE}/shard-000002.parquet.json", b'{"checksum": 7}')
    assert damage_marks(storage) == {}
    clear_marks(storage)
    assert [file.name[:12] for file in storage.list(layout.DAMAGE)] == ["shard-000001", "shard-000002"]
    assert repaired(storage)[1] == 0


def test_a_shard_that_does_not_open_needs_no_mark(storage):
    put(storage, "shard-000001.parquet", b"no shard")
    assert mark_damage(storage, "shard-000001.parquet", "x")
    assert mark_damage(storage, "shard-000099.parquet", "x")
    assert storage.list(layout.DAMAGE) == []


def test_where_no_shard_is_sound_the_model_must_be_named(storage):
    for name in shards_in(storage):
        put(storage, name, b"no shard")
    before = everything(storage)
    with pytest.raises(ShardDamaged, match=r"shard-000003\.parquet is damaged .*`model`"):
        repaired(storage)
    assert everything(storage) == before
    store, number, _ = repaired(storage, model_named=True)
    assert (number, len(store), shards_in(storage)) == (3, 0, [])


@pytest.mark.parametrize("name", fuzz.NEWER)
@pytest.mark.parametrize("others_damaged", [False, True])
def test_a_shard_that_a_newer_version_wrote_is_left_where_it_is(storage, name, others_damaged):
    put(storage, "shard-000004.parquet", fuzz.written(fuzz.NEWER[name]()))
    if others_damaged:
        put(storage, "shard-000001.parquet", b"no shard")
    before = everything(storage)
    with pytest.raises(ConfigError, match=r"shard-000004\.parquet.*made by a newer qvsplit"):
        repaired(storage, model_named=True)
    assert everything(storage) == before


def test_of_a_video_some_parts_of_which_are_lost_it_is_known(monkeypatch):
    """So that the next run encodes it again. What is sound stays, with all rows of the item in one shard."""
    monkeypatch.setattr("qvsplit.store.shard_writer.ROW_GROUP_ROWS", 1)
    monkeypatch.setattr("qvsplit.store.store_writer.SHARD_ROWS", 2)
    clip = rows.parts("c.mp4", 3)
    copy = rows.without_features(clip, path="copy.mp4", generation=2)
    storage = rows.write_store(MemoryStorage(), [*clip, rows.item("a.png")], copy)
    spoil_features(storage, 0, 2)
    assert mark_damage(storage, "shard-000001.parquet", "features")
    store, number, _ = repaired(storage)
    assert number == 1 and not store.holds((rows.sha("c.mp4"), 0)) and store.holds((rows.sha("a.png"), 0))
    held = {path: held for (_, path), (_, held) in store.folder_rows(("/photos", "")).items()}
    assert held == {"a.png": True, "c.mp4": False, "copy.mp4": False}
    assert [row.part for row in store if store.home(row.content)] == [0, 0, 1, 0, 1]
    with storage.lock() as lock:
        from qvsplit.store.compact import compact

        compact(storage, lock)
    assert rows.contents_without_features(read_store(storage)) == rows.contents_without_features(store)


def test_a_quarantined_shard_takes_parts_of_a_file_that_no_item_shows_any_more():
    """Its last parts: those that are left look like a shorter video, and are not taken for one."""
    clip = rows.parts("c.mp4", 4)
    gone = [
        (row, None) for row, _ in rows.without_features(rows.parts("c.mp4", 2, sha256=rows.sha("other")), generation=2)
    ]
    storage = rows.write_store(
        MemoryStorage(), clip[:2], clip[2:], [*rows.parts("x.mp4", 2, sha256=rows.sha("other")), *gone]
    )
    put(storage, "shard-000002.parquet", b"no shard")
    store, number, _ = repaired(storage)
    assert number == 1
    assert store.home_rows(rows.sha("c.mp4")) == [] and len(store.home_rows(rows.sha("other"))) == 2
