"""The one place that appends: in any order the same store, rollover, and what a full disk leaves."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import sys
import weakref
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qvsplit.errors import DiskError
from qvsplit.store import shard_writer, store_writer
from qvsplit.store.opening import read_store
from qvsplit.store.shards import ShardNumbers, shards_in
from qvsplit.store.storage import LocalStorage
from qvsplit.store.store_writer import StoreWriter
from tests.support import rows
from tests.support.memory_storage import MemoryStorage


def items() -> list[rows.Pair | list[rows.Pair]]:
    """Items of every sort; some show the same bytes, and have features of their own or none."""
    same = rows.sha("same")
    found = [
        rows.item("a.png", sha256=same, generation=2),
        rows.item("copy/a.png", sha256=same, generation=2),
        (rows.row("third/a.png", sha256=same, generation=2, has_features=False), None),
        rows.item("b.png", 10, generation=2),
        (rows.failed("c.png", generation=2), None),
        (rows.deleted("d.png", generation=2), None),
        rows.parts("e.mp4", 3, generation=2),
        rows.without_features(rows.parts("e.mp4", 3), path="copy/e.mp4", generation=2),
        rows.parts("third/e.mp4", 3, generation=2, sha256=rows.sha("e.mp4")),
    ]
    old = [rows.item("b.png", 6, sha256=rows.sha("older"), generation=1), (rows.failed("a.png", generation=1), None)]
    return found + old


def append(storage, found, writer=None, **options) -> StoreWriter:
    writer = writer or StoreWriter(storage, rows.schema(), **options)
    append_all(writer, found)
    writer.end_shard()
    return writer


def append_all(writer: StoreWriter, found) -> None:
    """Append items: a pair, or a list of one for each part."""
    for one in found:
        if isinstance(one, list):
            writer.append_item(iter(one))
        else:
            writer.append(*one)


def homes(storage) -> list:
    """Every content that has features on disk, as often as it is there."""
    return sorted(row.content for shard in read_store(storage).shards for row in shard.rows if row.has_features)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(store_writer, "SHARD_ROWS", 3)


EXPECTED = rows.contents(read_store(append(MemoryStorage(), items()).storage))


@hypothesis_settings(deadline=None, max_examples=25)
@given(st.permutations(range(len(items()))), st.sampled_from([(10_000, 1 << 28), (3, 1 << 28), (1, 1 << 28), (9, 400)]))
def test_any_order_gives_the_same_store(order, bounds):
    pairs, storage = items(), MemoryStorage()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store_writer, "SHARD_ROWS", bounds[0])
        patched.setattr(store_writer, "SHARD_BYTES", bounds[1])
        writer = append(storage, [pairs[place] for place in order])
    assert rows.contents(read_store(storage)) == EXPECTED
    found = homes(storage)
    assert len(found) == len(set(found))  # nothing twice
    assert writer.written.rows == len(pairs) + 6  # three items have three rows
    assert writer.written.shards == len(shards_in(storage))
    assert writer.written.bytes == sum(file.size for file in storage.list())


def test_a_row_is_given_back_as_it_was_written():
    writer = StoreWriter(MemoryStorage(), rows.schema())
    row, features = rows.item("a.png")
    assert writer.append(row, features) == row
    assert writer.append(rows.row("b.png", sha256=row.sha256), features).has_features is False
    assert writer.append(rows.row("c.png"), None).has_features is False  # whatever it claims
    assert writer.holds(row.content) and not writer.holds(rows.row("c.png").content)
    writer.abandon()


def test_features_that_are_held_are_not_written_again(small_shards):
    storage = MemoryStorage()
    row, features = rows.item("a.png")
    append(storage, [(row, features)])
    append(
        storage,
        [rows.item("b.png"), (rows.row("x.png", sha256=row.sha256), features)],
        is_held={row.content}.__contains__,
    )
    assert len(homes(storage)) == 2
    store = read_store(storage)
    assert rows.raws(store.features(store.current("/photos", "x.png"))) == rows.raws(features)


def test_the_same_hash_of_another_part_is_other_content():
    storage = MemoryStorage()
    append(storage, [rows.parts("a.mp4", 3)])
    assert len(homes(storage)) == 3


@pytest.mark.parametrize(("rows_", "bytes_", "shards"), [(3, 1 << 28, 4), (10_000, 3 * 192, 4), (10_000, 1 << 28, 1)])
def test_a_shard_ends_by_rows_and_by_bytes(monkeypatch, rows_, bytes_, shards):
    monkeypatch.setattr(store_writer, "SHARD_ROWS", rows_)
    monkeypatch.setattr(store_writer, "SHARD_BYTES", bytes_)
    storage = MemoryStorage()
    append(storage, [rows.item(f"{n}.png") for n in range(10)])
    assert shards_in(storage) == [f"shard-{n:06d}.parquet" for n in range(1, shards + 1)]


def test_a_shard_ends_by_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(store_writer, "active_seconds", lambda: now[0])
    storage, writer = MemoryStorage(), None
    writer = StoreWriter(storage, rows.schema())
    for number in range(4):
        writer.append(*rows.item(f"{number}.png"))
        now[0] += store_writer.SHARD_SECONDS * 0.6
    writer.end_shard()
    assert [len(shard.rows) for shard in read_store(storage).shards] == [3, 1]


def test_nothing_appended_writes_nothing():
    begun = []
    storage = MemoryStorage()
    writer = StoreWriter(storage, rows.schema(), on_begin=lambda: begun.append(1))
    writer.end_shard()
    writer.abandon()
    assert storage.list() == [] and begun == []


def test_who_is_to_know_of_a_shard_hears_before_it_is_begun(small_shards):
    begun = []
    storage = MemoryStorage()
    append(
        storage,
        [rows.item(f"{n}.png") for n in range(5)],
        on_begin=lambda: begun.append(len(shards_in(storage))),
    )
    assert begun == [0, 1]


def test_shards_come_behind_all_others_and_above_the_first_number():
    storage = rows.write_store(MemoryStorage(), [rows.item("a.png")], [rows.item("b.png")])
    append(storage, [rows.item("c.png")])
    append(storage, [rows.item("d.png")], numbers=ShardNumbers(storage, 100))
    append(storage, [rows.item("e.png")], numbers=ShardNumbers(storage, 50))
    assert shards_in(storage)[2:] == ["shard-000003.parquet", "shard-000100.parquet", "shard-000101.parquet"]


def test_named_tensors_are_written(small_shards):
    declared = rows.schema("float16", levels=2)
    storage = MemoryStorage()
    writer = StoreWriter(storage, declared)
    pairs = [rows.item(f"{n}.png", dtype="float16", levels=2) for n in range(5)]
    for row, features in pairs:
        writer.append(row, features)
    writer.end_shard()
    store = read_store(storage)
    assert [rows.raws(store.features(row)) for row in store] == [rows.raws(features) for _, features in pairs]


def test_a_row_that_is_refused_leaves_the_shard_as_it_was():
    storage = MemoryStorage()
    writer = StoreWriter(storage, rows.schema())
    writer.append(*rows.item("a.png"))
    bad = rows.row("b.png", n_tokens=7)
    with pytest.raises(ValueError, match="tokens"):
        writer.append(bad, rows.features(6))
    assert not writer.holds(bad.content) and writer.written.rows == 1
    writer.end_shard()
    assert [row.path for row in read_store(storage).rows] == ["a.png"]


# ------------------------------------------------------------------------------------------------------ a full disk


class FullStorage(MemoryStorage):
    """A disk that is full after so many shards, and so many bytes of the next."""

    def __init__(self, shards: int, room: int) -> None:
        super().__init__()
        self.shards, self.room = shards, room

    @contextmanager
    def put_whole(self, name, *, durable=True):
        with super().put_whole(name, durable=durable) as stream:
            if len(shards_in(self)) < self.shards:
                yield stream
            else:
                yield Full(stream, self.room)


class Full:
    def __init__(self, stream, room: int) -> None:
        self._stream, self._room = stream, room

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, data):
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._stream.write(data)


@pytest.mark.parametrize("room", [0, 3, 1500, 4000])
def test_a_shard_that_fails_on_a_full_disk_never_appears_and_finished_ones_stay(monkeypatch, room):
    monkeypatch.setattr(store_writer, "SHARD_ROWS", 4)
    monkeypatch.setattr(shard_writer, "ROW_GROUP_ROWS", 1)
    storage = FullStorage(2, room)
    writer = StoreWriter(storage, rows.schema())
    with pytest.raises(DiskError, match="the disk is full; finished shards are kept"):
        append_all(writer, [rows.item(f"{number:02d}.png") for number in range(12)])
    assert shards_in(storage) == ["shard-000001.parquet", "shard-000002.parquet"]
    assert [row.path for row in read_store(storage)] == [f"{number:02d}.png" for number in range(8)]
    assert writer.written.shards == 2
    assert writer.holds(rows.row("00.png").content) and not writer.holds(rows.row("08.png").content)
    storage.shards = 9  # room was made: the same writer may go on
    writer.append(*rows.item("08.png"))
    writer.end_shard()
    assert len(read_store(storage)) == 9


def test_a_full_disk_leaves_no_staged_file(tmp_path, monkeypatch):
    storage = LocalStorage(tmp_path)
    writer = StoreWriter(storage, rows.schema())
    writer.append(*rows.item("a.png"))
    writer.end_shard()
    writer.append(*rows.item("b.png"))
    with monkeypatch.context() as patched:

        def fail(*args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patched.setattr(os, "replace", fail)
        with pytest.raises(DiskError, match="full"):
            writer.end_shard()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["shard-000001.parquet"]
    assert not writer.holds(rows.row("b.png").content)


def test_abandoned_a_shard_takes_nothing_with_it_but_its_own(small_shards):
    storage = MemoryStorage()
    writer = StoreWriter(storage, rows.schema())
    for number in range(4):
        writer.append(*rows.item(f"{number}.png"))
    writer.abandon()
    assert [row.path for row in read_store(storage)] == ["0.png", "1.png", "2.png"]
    assert not writer.holds(rows.row("3.png").content)


# ----------------------------------------------------------------------------------------------- items of several parts


def parts_by_shard(storage) -> list[list[str]]:
    return [[row.name for row in shard.rows] for shard in read_store(storage).shards]


@pytest.fixture(params=["in memory", "in a shard of its own"])
def item_bytes(request, monkeypatch):
    """How many bytes of an item are kept: all, or none."""
    monkeypatch.setattr(store_writer, "ITEM_BYTES", 1 << 20 if request.param == "in memory" else 0)
    return request.param


def test_no_shard_ends_between_the_parts_of_an_item(monkeypatch, item_bytes):
    storage = MemoryStorage()
    monkeypatch.setattr(store_writer, "SHARD_ROWS", 2)
    monkeypatch.setattr(store_writer, "SHARD_BYTES", 100)
    clips = rows.parts("c.mp4", 5)
    copy = rows.without_features(clips, path="copy.mp4")
    append(storage, [rows.item("a.png", 2), clips, copy, rows.item("b.png")])
    found = parts_by_shard(storage)
    whole = [[f"{name}#{part}" for part in range(5)] for name in ("c.mp4", "copy.mp4")]
    if item_bytes == "in memory":
        assert found == [["a.png", *whole[0]], whole[1], ["b.png"]]
    else:
        assert found == [["a.png"], whole[0], whole[1], ["b.png"]]
    assert len(homes(storage)) == 7


def test_the_rows_of_an_item_are_given_back_as_they_were_written(item_bytes):
    writer = StoreWriter(MemoryStorage(), rows.schema())
    clips = rows.parts("c.mp4", 3)
    assert writer.append_item(iter(clips)) == [row for row, _ in clips]
    assert writer.written.rows == 3 and all(writer.holds(row.content) for row, _ in clips)
    again = writer.append_item(rows.parts("copy.mp4", 3, sha256=rows.sha("c.mp4")))
    assert [row.has_features for row in again] == [False] * 3
    writer.abandon()


def test_a_long_video_is_never_in_memory_at_once(monkeypatch):
    monkeypatch.setattr(store_writer, "ITEM_BYTES", 1000)
    held, most, whole = [], 0, 0

    def one_by_one():
        nonlocal most, whole
        for number in range(50):
            row, features = rows.part("c.mp4", number, 50)
            held.append(weakref.ref(features))
            whole += sum(one.raw.nbytes for one in features.tensors.values())
            del features
            yield row, rows.part("c.mp4", number, 50)[1]
            most = max(most, waiting(writer))

    def waiting(writer) -> int:
        frame = sys._getframe(2)  # of the writer that takes the parts
        return sum(one.bytes for one in frame.f_locals["waiting"])

    storage = MemoryStorage()
    writer = StoreWriter(storage, rows.schema())
    writer.append_item(one_by_one())
    writer.end_shard()
    assert 0 < most < 1500 < whole
    assert [len(names) for names in parts_by_shard(storage)] == [50]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_where_an_item_does_not_come_to_its_end_nothing_of_it_is_written_and_nothing_else_lost(
    item_bytes, error, after
):
    def broken():
        yield from rows.parts("c.mp4", 5)[:after]
        raise error("no more")

    storage = MemoryStorage()
    writer = StoreWriter(storage, rows.schema())
    writer.append(*rows.item("a.png"))
    with pytest.raises(error, match="no more"):
        writer.append_item(broken())
    assert not writer.holds((rows.sha("c.mp4"), 0)) and writer.written.rows == 1
    writer.append(*rows.item("b.png"))
    writer.append_item(rows.parts("c.mp4", 2, sha256=rows.sha("other")))
    writer.end_shard()
    assert list(itertools.chain(*parts_by_shard(storage))) == ["a.png", "b.png", "c.mp4#0", "c.mp4#1"]


@pytest.mark.parametrize("shown", ["parts lacking", "another file", "twice", "none", "backwards", "a value"])
def test_what_is_not_all_of_one_item_is_refused_as_a_whole(item_bytes, shown):
    clips = rows.parts("c.mp4", 3)
    spoiled = dataclasses.replace(clips[2][0], n_tokens=7)
    wrong = {
        "parts lacking": clips[:2], "another file": [clips[0], rows.parts("d.mp4", 3)[1], clips[2]],
        "twice": [*clips, clips[2]], "none": [], "backwards": clips[::-1], "a value": [*clips[:2], (spoiled, clips[2][1])],
    }[shown]  # fmt: skip
    storage = MemoryStorage()
    writer = StoreWriter(storage, rows.schema())
    writer.append(*rows.item("a.png"))
    with pytest.raises(ValueError, match="part|tokens"):
        writer.append_item(wrong)
    writer.end_shard()
    assert parts_by_shard(storage) == [["a.png"]]


def test_a_part_is_not_appended_alone():
    writer = StoreWriter(MemoryStorage(), rows.schema())
    with pytest.raises(ValueError, match="all its parts"):
        writer.append(*rows.part("c.mp4", 0, 2))
    writer.append(*rows.part("c.mp4", 0, 1))
    writer.abandon()


def test_nothing_comes_between_the_parts_of_an_item(item_bytes):
    writer = StoreWriter(MemoryStorage(), rows.schema())
    for meanwhile in (lambda: writer.append(*rows.item("a.png")), writer.end_shard):

        def parts(meanwhile=meanwhile):
            yield rows.part("c.mp4", 0, 2)
            meanwhile()
            yield rows.part("c.mp4", 1, 2)

        with pytest.raises(RuntimeError, match="parts of an item"):
            writer.append_item(parts())
    writer.append_item(rows.parts("c.mp4", 2))
    writer.abandon()


@pytest.mark.parametrize("room", [0, 3, 1500, 4000])
def test_a_full_disk_leaves_no_part_of_an_item(monkeypatch, item_bytes, room):
    monkeypatch.setattr(shard_writer, "ROW_GROUP_ROWS", 1)
    storage = FullStorage(1, room)
    writer = StoreWriter(storage, rows.schema())
    writer.append(*rows.item("a.png"))
    writer.end_shard()
    with pytest.raises(DiskError, match="full"):
        append(storage, [rows.parts(f"{number}.mp4", 4) for number in range(6)], writer=writer)
    for names in parts_by_shard(storage):
        assert names == ["a.png"] or len(names) % 4 == 0
    store = read_store(storage)
    assert writer.written.shards == len(store.shards)
    missing = [number for number in range(6) if not store.rows_of("/photos", f"{number}.mp4")]
    storage.shards = 9
    append_all(writer, [rows.parts(f"{number}.mp4", 4) for number in missing])
    writer.end_shard()
    assert len(read_store(storage)) == 25


def test_of_a_content_of_which_some_parts_were_lost_all_are_written_again():
    """So that they are in one shard again. `is_held` says of no part that it is there unless all are, as a store does."""
    clips = rows.parts("c.mp4", 3)
    storage = rows.write_store(MemoryStorage(), clips[:2])
    store = read_store(storage)
    append(storage, [rows.parts("c.mp4", 3, generation=2)], is_held=store.holds)
    assert [row.has_features for row in read_store(storage).shards[1].rows] == [True] * 3
    assert read_store(storage).holds((rows.sha("c.mp4"), 0))
