"""compact and purge, on tiny shards and without a model."""

from __future__ import annotations

import os

import pytest

from qvsplit.errors import StoreInUse, UsageError
from qvsplit.store import compact as compacting
from qvsplit.store import layout
from qvsplit.store.compact import compact, opened_for_writing, purge
from qvsplit.store.opening import read_store
from qvsplit.store.shards import shards_in
from qvsplit.store.storage import LocalStorage
from tests.support import rows
from tests.support.memory_storage import MemoryStorage


@pytest.fixture(params=["local", "memory"])
def empty(request, tmp_path):
    return LocalStorage(tmp_path / "store") if request.param == "local" else MemoryStorage()


def compacted(storage):
    with storage.lock() as lock:
        return compact(storage, lock)


def purged(storage, *names: str):
    with storage.lock() as lock:
        return purge(storage, names, lock)


def every_byte(storage) -> bytes:
    """All that the shards hold, as a reader has it: names, hashes and features."""
    parts = []
    for shard in read_store(storage).shards:
        for _, row, features in shard:
            parts += [repr(row).encode(), *(rows.raws(features) or {}).values()]
    return b"\n".join(parts)


# -------------------------------------------------------------------------------------------------------- compact


def test_small_shards_are_merged_and_nothing_else_changes(empty):
    storage = rows.write_store(empty, [rows.item("a.png")], [rows.item("b.png")], [(rows.failed("c.png"), None)])
    before = rows.contents(read_store(storage))
    done = compacted(storage)
    assert (done.shards_before, done.shards_after, done.rows_dropped) == (3, 1, 0)
    assert rows.contents(read_store(storage)) == before


def test_a_single_shard_in_which_all_is_current_is_left_alone(empty):
    storage = rows.write_store(empty, [rows.item("a.png"), rows.item("b.png")])
    before = storage.list()
    done = compacted(storage)
    assert storage.list() == before
    assert (done.shards_before, done.shards_after, done.bytes_before) == (1, 1, done.bytes_after)


def test_features_that_a_copy_needs_are_no_reason_to_write_a_shard_again(empty):
    copy = rows.row("copy.png", sha256=rows.sha("a.png"), has_features=False)
    storage = rows.write_store(empty, [rows.item("a.png"), (copy, None), (rows.deleted("a.png", generation=2), None)])
    before = storage.list()
    assert compacted(storage).rows_dropped == 0 and storage.list() == before


def test_what_is_superseded_is_dropped(empty, monkeypatch):
    """A large shard is written again only where enough of it is of no use."""
    monkeypatch.setattr(compacting, "SMALL_BYTES", 0)
    many = [rows.item(f"{n}.png") for n in range(10)]
    storage = rows.write_store(empty, many, [rows.item("0.png", generation=2, sha256=rows.sha("0 again"))])
    assert compacted(storage).rows_dropped == 0
    assert shards_in(storage) == ["shard-000001.parquet", "shard-000002.parquet"]
    more = [rows.item(f"{n}.png", generation=3, sha256=rows.sha(f"{n} again")) for n in (1, 2)]
    rows.write_shard(storage, "shard-000003.parquet", more)
    before = rows.contents(read_store(storage))
    assert compacted(storage).rows_dropped == 3
    assert shards_in(storage) == ["shard-000002.parquet", "shard-000003.parquet", "shard-000004.parquet"]
    assert rows.contents(read_store(storage)) == before


def test_features_that_only_an_older_row_of_another_name_holds_are_kept(empty):
    copy = rows.row("copy.png", sha256=rows.sha("a.png"), has_features=False, generation=2)
    storage = rows.write_store(empty, [rows.item("a.png")], [(copy, None), (rows.deleted("a.png", generation=2), None)])
    before = rows.contents(read_store(storage))
    compacted(storage)
    assert rows.contents(read_store(storage)) == before
    assert read_store(storage).home(copy.content).path == "copy.png"


def test_named_tensors_are_compacted_bit_for_bit(empty):
    pairs = [rows.item(f"{n}.png", dtype="float32", levels=3) for n in range(4)]
    storage = rows.write_store(empty, *([pair] for pair in pairs), declared=rows.schema("float32", levels=3))
    compacted(storage)
    (shard,) = read_store(storage).shards
    assert [rows.raws(features) for _, _, features in shard] == [rows.raws(features) for _, features in pairs]


def test_a_store_is_opened_for_writing_only_where_there_is_one(tmp_path):
    storage = rows.write_store(tmp_path / "store", [rows.item("a.png")])
    with opened_for_writing(tmp_path / "store") as (opened, _):
        assert opened.location == storage.location
        with pytest.raises(StoreInUse), opened_for_writing(tmp_path / "store"):
            pass
    (tmp_path / "empty").mkdir()
    for place, what in (("empty", "no store at"), ("nowhere", "no store at"), ("store/shard-000001.parquet", "a file")):
        with pytest.raises(UsageError, match=what), opened_for_writing(tmp_path / place):
            pass
    assert os.listdir(tmp_path / "empty") == [] and not (tmp_path / "nowhere").exists()


# ---------------------------------------------------------------------------------------------------------- purge


def test_purge_leaves_no_row_and_no_byte(empty):
    row, features = rows.item("secret.png", 10)
    storage = rows.write_store(
        empty, [rows.item("a.png"), (row, features)], [rows.item("b.png")],
        [(rows.row("secret.png", sha256=row.sha256, generation=2, has_features=False), None)],
    )  # fmt: skip
    bytes_ = rows.raws(features)["pooler_output"]
    assert bytes_ in every_byte(storage)
    done = purged(storage, "/photos/secret.png")
    assert (done.purged, done.shared, done.still_there) == (1, 0, 0)
    assert [row.path for row in read_store(storage).rows] == ["a.png", "b.png"]
    left = every_byte(storage)
    assert bytes_ not in left and b"secret" not in left and row.sha256.encode() not in left
    assert "shard-000002.parquet" in shards_in(storage)  # which held nothing of it


def test_purge_of_named_tensors_leaves_no_byte(empty):
    pairs = [rows.item(f"{n}.png", levels=2) for n in range(2)]
    storage = rows.write_store(empty, pairs, declared=rows.schema(levels=2))
    purged(storage, "1.png")
    left = every_byte(storage)
    assert all(blob in left for blob in rows.raws(pairs[0][1]).values())
    assert not any(blob in left for blob in rows.raws(pairs[1][1]).values())


def test_features_that_another_item_shows_are_kept(empty):
    row, features = rows.item("a.png")
    copy = rows.row("copy.png", sha256=row.sha256, has_features=False)
    storage = rows.write_store(empty, [(row, features)], [(copy, None)])
    done = purged(storage, "a.png")
    assert (done.purged, done.shared) == (1, 1)
    store = read_store(storage)
    assert [row.path for row in store.rows] == ["copy.png"]
    assert rows.raws(store.features(store.current("/photos", "copy.png"))) == rows.raws(features)


def test_old_names_of_the_same_bytes_go_too(empty):
    """They would tell the hash of what was purged."""
    row, features = rows.item("new.png", generation=2)
    storage = rows.write_store(
        empty, [rows.item("old.png", sha256=row.sha256)],
        [(rows.deleted("old.png", sha256=row.sha256, generation=2), None), (row, features)], [rows.item("x.png")],
    )  # fmt: skip
    purged(storage, "new.png")
    assert [row.path for row in read_store(storage).rows] == ["x.png"]
    assert row.sha256.encode() not in every_byte(storage)


def test_a_folder_is_purged_by_its_place_or_by_its_path_below_the_root(empty):
    pairs = [rows.item(name) for name in ("a/1.png", "a/b/2.png", "ab/3.png", "a.png")]
    storage = rows.write_store(empty, pairs)
    assert purged(storage, "/photos/a/b").purged == 1
    assert purged(storage, "a/").purged == 1
    assert [row.path for row in read_store(storage).rows] == ["a.png", "ab/3.png"]
    assert purged(storage, "/photos").purged == 2
    assert shards_in(storage) == []


def test_a_name_that_is_none_or_in_two_roots_is_refused(empty):
    storage = rows.write_store(empty, [rows.item("a.png"), rows.item("a.png", root="/other")])
    for name, what in (("", "empty name"), ("nothing.png", "knows no item"), ("a.png", "more than one root")):
        with pytest.raises(UsageError, match=what):
            purged(storage, name)
    assert purged(storage, "/other/a.png").purged == 1


def test_purge_reaches_caches_quarantine_and_marks(empty):
    storage = rows.write_store(empty, [rows.item("a.png")], [rows.item("b.png")])
    for name in (layout.CATALOGUE, f"{layout.QUARANTINE}/shard-000009.parquet",
                 f"{layout.DAMAGE}/shard-000001.parquet.json"):  # fmt: skip
        with storage.put_whole(name) as stream:
            stream.write(b"a.png")
    done = purged(storage, "a.png")
    assert done.removed_quarantined == 1
    assert all(storage.list(folder) == [] for folder in (layout.QUARANTINE, layout.DAMAGE))
    catalogue = storage.local_path(layout.CATALOGUE)
    assert catalogue is None or b"a.png" not in catalogue.read_bytes()


def test_purge_reaches_an_unfinished_rebuild(tmp_path):
    storage = rows.write_store(tmp_path, [rows.item("a.png"), rows.item("b.png")])
    rows.write_store(tmp_path / layout.REBUILD, [rows.item("a.png")])
    assert purged(storage, "a.png").removed_rebuild
    assert not (tmp_path / layout.REBUILD).exists()


def test_purge_says_which_files_still_exist(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    storage = rows.write_store(tmp_path / "store", [rows.item(name, root=str(tmp_path)) for name in ("a.png", "b.png")])
    assert purged(storage, str(tmp_path)).still_there == 1


# ----------------------------------------------------------------------------------------------- items of several parts


def test_a_video_in_parts_is_compacted_and_purged_as_one_item(empty, monkeypatch):
    monkeypatch.setattr("qvsplit.store.store_writer.SHARD_ROWS", 2)
    clip, other = rows.parts("c.mp4", 5), rows.parts("d.mp4", 2)
    copies = rows.without_features(other, path="e.mp4")
    storage = rows.write_store(empty, [rows.item("a.png"), *clip], [*other, *copies], [rows.item("b.png")])
    before = rows.contents(read_store(storage))
    compacted(storage)
    assert rows.contents(read_store(storage)) == before
    assert all({row.part for row in shard.rows if row.path == "c.mp4"} in (set(), set(range(5)))
               for shard in read_store(storage).shards)  # fmt: skip

    done = purged(storage, "c.mp4", "d.mp4")
    assert (done.purged, done.shared, done.still_there) == (2, 1, 0)
    assert rows.contents(read_store(storage)) == {
        key: held for key, held in before.items() if key[1] in ("a.png", "b.png", "e.mp4")
    }
    left = every_byte(storage)
    assert not any(blob in left for _, features in clip for blob in rows.raws(features).values())
    assert b"c.mp4" not in left and clip[0][0].sha256.encode() not in left


def test_a_file_that_still_exists_is_said_once(tmp_path):
    (tmp_path / "c.mp4").touch()
    clip = [(row, features) for row, features in rows.parts("c.mp4", 3, root=str(tmp_path))]
    storage = rows.write_store(tmp_path / "store", clip)
    done = purged(storage, "c.mp4")
    assert (done.purged, done.shared, done.still_there, done.rows_dropped) == (1, 0, 1, 3)


# -------------------------------------------------------------------------------------------------------- foretold


def foretold(storage, call, *words):
    """What would be done by one call, and that nothing changed for it."""
    before = {name: storage.open(name).read() for name in shards_in(storage)}
    said = call(storage, compacting._opened(storage), *words)
    assert {name: storage.open(name).read() for name in shards_in(storage)} == before
    return said


def test_what_a_compaction_would_do_is_what_it_does(empty):
    again = rows.item("a.png", generation=2, sha256=rows.sha("a again"))
    storage = rows.write_store(empty, [rows.item("a.png"), rows.item("b.png")], [again])
    said = foretold(storage, compacting.foretell_compact)
    done = compacted(storage)
    assert (said.shards, said.bytes) == (done.shards_before, done.bytes_before)
    assert (said.rows_dropped, done.rows_dropped) == (1, 1)
    assert (said.shards_rewritten, said.bytes_rewritten, said.features_dropped) == (2, done.bytes_before, 1)
    assert said.rows_kept == 2 == sum(len(shard.rows) for shard in read_store(storage).shards)
    said = foretold(storage, compacting.foretell_compact)
    assert (said.shards_rewritten, said.rows_kept, said.rows_dropped, said.features_dropped) == (0, 0, 0, 0)


def test_what_a_purge_would_do_is_what_it_does(empty):
    storage = rows.write_store(empty, [rows.item("a.png"), rows.item("b.png"), rows.item("c.png")])
    said = foretold(storage, compacting.foretell_purge, ["b.png"])
    done = purged(storage, "b.png")
    assert [row.path for row in said.items] == ["b.png"]
    assert (said.shared, said.still_there, said.removed_quarantined, said.removed_rebuild) == (
        done.shared, done.still_there, done.removed_quarantined, done.removed_rebuild,
    )  # fmt: skip
    assert (said.rows_dropped, said.rows_kept) == (done.rows_dropped, 2)
    with pytest.raises(UsageError, match="knows no item"):
        foretold(storage, compacting.foretell_purge, ["b.png"])
