"""A store made again beside the old one, and put in its place, wherever that is cut short."""

from __future__ import annotations

import os

import pytest

from qvsplit.errors import DiskError, StoreDamaged, StoreInUse
from qvsplit.store import layout, rebuild
from qvsplit.store.opening import open_store, read_store
from qvsplit.store.shards import placed_from, shard_paths, shards_in
from tests.support import rows
from tests.support.memory_storage import MemoryStorage


@pytest.fixture
def storage(tmp_path):
    return rows.write_store(tmp_path / "store", [rows.item("a.png")], [rows.item("b.png")])


def rebuilt(storage, numbers=(3, 4)):
    """Put a whole new store beside the old one."""
    new = rebuild.begin(storage)
    for number in numbers:
        row, features = rows.item(f"{number}.png", generation=2, dtype="float32")
        rows.write_shard(new, layout.shard_name(number), [(row, features)], rows.schema("float32"))
    return new


def test_the_new_store_takes_the_place_of_the_old(storage):
    new = rebuilt(storage)
    expected = rows.contents(read_store(new))
    with new.put_whole(layout.CATALOGUE) as stream:
        stream.write(b"a cache of its own")
    rebuild.put_in_place(storage)
    assert rows.contents(open_store(storage.folder)) == expected
    assert shards_in(storage) == ["shard-000003.parquet", "shard-000004.parquet"]
    assert not (storage.folder / layout.REBUILD).exists()
    rebuild.finish(storage)  # nothing to do
    assert rows.contents(open_store(storage.folder)) == expected


class Cut(Exception):
    pass


# the first call of unlink is before the marker
STEPS = [*(("unlink", number) for number in range(2, 6)), ("rename", 1), ("rename", 2), ("rmdir", 1), ("rmdir", 2)]


@pytest.mark.parametrize(("call", "number"), STEPS)
def test_cut_short_anywhere_it_is_finished_by_the_next(storage, monkeypatch, call, number):
    new = rebuilt(storage)
    expected = rows.contents(read_store(new))
    calls = []
    real = getattr(os, call)

    def cut(*args, **more):
        calls.append(args)
        if len(calls) == number:
            raise Cut
        return real(*args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, cut)
        with pytest.raises(Cut):
            rebuild.put_in_place(storage)
    if (storage.folder / layout.REBUILD_COMPLETE).exists():
        with pytest.raises(StoreInUse, match="replaced by its rebuild"):
            shard_paths(storage.folder)
    rebuild.finish(storage)
    assert rows.contents(open_store(storage.folder)) == expected
    assert not (storage.folder / layout.REBUILD_COMPLETE).exists()


@pytest.mark.parametrize("call", ["unlink", "replace", "fsync"])
def test_before_the_marker_the_old_store_is_the_store(storage, monkeypatch, call):
    before = rows.contents(open_store(storage.folder))
    rebuilt(storage)

    def cut(*args, **more):
        raise Cut

    with monkeypatch.context() as patched:
        patched.setattr(os, call, cut)
        with pytest.raises(Cut):
            rebuild.put_in_place(storage)
    rebuild.finish(storage)
    assert rows.contents(open_store(storage.folder)) == before
    assert placed_from(storage) is None


def test_what_a_killed_rebuild_left_is_taken_up(storage):
    new = rebuilt(storage)
    with open(new.folder / "x", "wb"):
        pass
    (new.folder / layout.STAGING).mkdir(parents=True, exist_ok=True)
    (new.folder / layout.STAGING / ".half.tmp").write_bytes(b"half")
    again = rebuild.begin(storage)
    assert again.location == new.location
    assert shards_in(again) == ["shard-000003.parquet", "shard-000004.parquet"]
    assert again.list(layout.STAGING) == []


def test_its_shards_are_numbered_above_those_that_ordinary_runs_wrote_meanwhile(storage):
    expected = rows.contents(read_store(rebuilt(storage)))
    for number in (3, 4, 5):
        rows.write_shard(storage, layout.shard_name(number), [rows.item(f"new{number}.png")])
    again = rebuild.begin(storage)
    assert shards_in(again) == ["shard-000006.parquet", "shard-000007.parquet"]
    assert rows.contents(read_store(again)) == expected
    rebuild.put_in_place(storage)
    assert rows.contents(open_store(storage.folder)) == expected


def test_an_unfinished_rebuild_is_given_up(storage):
    assert not rebuild.discard(storage)
    rebuilt(storage)
    assert rebuild.discard(storage)
    assert not (storage.folder / layout.REBUILD).exists()
    assert len(open_store(storage.folder)) == 2


def test_a_marker_that_cannot_be_read_is_not_guessed_at(storage):
    rebuilt(storage)
    for text in ("", "{}", "[]", '{"first": "x"}'):
        (storage.folder / layout.REBUILD_COMPLETE).write_text(text)
        with pytest.raises(StoreDamaged, match="cannot be read; remove"):
            rebuild.finish(storage)
    assert len(shards_in(storage)) == 2


def test_a_full_disk_is_said(storage, monkeypatch):
    rebuilt(storage)

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(DiskError, match="full"):
        rebuild.put_in_place(storage)


def test_roots_that_would_be_lost_are_named():
    found = [rows.row("a.png"), rows.row("b/c.png", root="/other"), rows.deleted("d.png", root="/deleted")]
    assert rebuild.roots_left_out(found, ["/photos"]) == ["/other"]
    assert rebuild.roots_left_out(found, ["/photos", "/other/b"]) == []
    assert rebuild.roots_left_out(found, ["/photo"]) == ["/other", "/photos"]


def test_it_works_on_any_storage():
    """A rebuild is put in place, or given up, through the door alone: nothing of it is left behind."""
    for keep in (True, False):
        storage = rows.write_store(MemoryStorage(), [rows.item("a.png")], [rows.item("b.png")])
        new = rebuilt(storage)
        expected = rows.contents(read_store(new if keep else storage))
        if keep:
            rebuild.put_in_place(storage)
        else:
            assert rebuild.discard(storage)
        assert rows.contents(read_store(storage)) == expected
        assert not [name for name in storage.files if name.startswith(layout.REBUILD)]
        assert not rebuild.discard(storage)
