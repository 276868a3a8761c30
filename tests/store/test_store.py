"""What is current in a store, where features are found, and that other readers open it too."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import sqlite3

import pyarrow.parquet as pq
import pytest

from qvsplit.errors import ConfigError, StoreDamaged, StoreInUse, UsageError
from qvsplit.store import layout
from qvsplit.store.config import Provenance
from qvsplit.store.opening import open_store, read_store
from qvsplit.store.schema import row_columns
from qvsplit.store.storage import LocalStorage
from qvsplit.store.store import Store
from tests.support import fuzz, rows
from tests.support.memory_storage import MemoryStorage


def store_of(*shards) -> Store:
    return read_store(rows.write_store(MemoryStorage(), *shards))


# -------------------------------------------------------------------------------------------------- what is current


def test_the_rows_of_the_highest_generation_are_current_in_any_order_of_shards():
    shards = [
        [rows.item("a.png", generation=generation, sha256=rows.sha(f"a{generation}"))] for generation in (1, 2, 3)
    ]
    for order in itertools.permutations(shards):
        store = store_of(*order)
        assert store.current("/photos", "a.png").sha256 == rows.sha("a3")
        assert [row.generation for row in store.rows] == [3] and store.generation == 3


def test_of_equal_generations_the_later_place_wins():
    first, second = (rows.item("a.png", sha256=rows.sha(text)) for text in ("first", "second"))
    assert store_of([first], [second]).current("/photos", "a.png").sha256 == rows.sha("second")
    assert store_of([second, first]).current("/photos", "a.png").sha256 == rows.sha("first")


def test_several_parts_of_an_item_are_current_together():
    clip = [rows.part("c.mp4", number, 3, generation=2) for number in (2, 0, 1)]
    before = rows.part("c.mp4", 7, 8, generation=1)
    for store in (store_of([before, *clip]), store_of(clip, [before]), store_of([clip[0]], [clip[1], clip[2]])):
        assert [row.part for row in store.rows] == [row.part for row in store] == [0, 1, 2]
        assert store.current("/photos", "c.mp4").part == 0
        assert {rows.raws(store.features(row))["pooler_output"] for row in store} == {
            rows.raws(features)["pooler_output"] for _, features in clip
        }
    repeated = rows.part("c.mp4", 0, 3, generation=2, warnings="repeated")
    assert [(row.part, row.warnings) for row in store_of(clip, [repeated]).rows] == [
        (0, "repeated"),
        (1, None),
        (2, None),
    ]
    again = rows.part("c.mp4", 0, 1, generation=3)
    assert [(row.part, row.generation) for row in store_of(clip, [again]).rows] == [(0, 3)]


def test_deleted_and_failed_rows_are_current_but_cannot_be_asked_about():
    store = store_of([rows.item("a.png"), rows.item("b.png")],
                     [(rows.deleted("a.png", generation=2), None), (rows.failed("c.png"), None)])  # fmt: skip
    assert [(row.path, row.status) for row in store.rows] == [
        ("a.png", "deleted"), ("b.png", "ok"), ("c.png", "failed"),
    ]  # fmt: skip
    assert [row.path for row in store] == ["b.png"] and len(store) == 1
    for name in ("a.png", "c.png"):
        with pytest.raises(UsageError, match=f"{name} has no features"):
            store.features(store.current("/photos", name))
    assert store.current("/photos", "nothing.png") is None


def test_it_is_known_which_very_row_is_current():
    store = store_of([rows.item("a.png"), rows.item("a.png", generation=2)])
    assert [store.is_current(row) for row in store.shards[0].rows] == [False, True]


# ------------------------------------------------------------------------------------------------------ the features


def test_a_copy_has_the_features_of_its_content():
    own, features = rows.item("a.png")
    copy = rows.row("b.png", sha256=own.sha256, has_features=False)
    store = store_of([(copy, None)], [(own, features)])
    assert rows.raws(store.features(store.current("/photos", "b.png"))) == rows.raws(features)
    assert store.home(copy.content).path == "a.png"
    assert store.holds(own.content) and not store.holds((rows.sha("other.png"), 0))


def test_content_is_hash_and_part():
    one, other = rows.parts("a.mp4", 2)
    store = store_of([one, other])
    for row, features in (one, other):
        assert rows.raws(store.features(row)) == rows.raws(features)
    with pytest.raises(StoreDamaged, match="in no shard given"):
        store.features(rows.part("a.mp4", 2, 3)[0])


def test_features_that_no_shard_holds_say_what_to_do():
    store = store_of([(rows.row("b.png", has_features=False), None)])
    with pytest.raises(StoreDamaged, match=r"the features of b\.png are in no shard given.*qvsplit extract"):
        store.features(store.current("/photos", "b.png"))
    assert store.home(None) is None


def test_a_later_home_is_the_home():
    """So a shard that repeats features may take the place of the one it repeats."""
    store = store_of([rows.item("a.png")], [rows.item("a.png")])
    content = store.current("/photos", "a.png").content
    assert store.catalogue.home(content) == (2, 0)


def test_tensors_are_read_by_their_names(tmp_path):
    """Of a copy, and of what a compaction has written anew meanwhile, too."""
    copied = rows.row("copy.png", sha256=rows.sha("a.png"), has_features=False)
    declared = rows.schema(levels=2)
    storage = rows.write_store(tmp_path, [rows.item("a.png", levels=2), (copied, None)], declared=declared)
    store = open_store(tmp_path)
    whole = rows.raws(store.features("a.png"))
    both = ["deepstack_features_1", "pooler_output"]
    for row in ("a.png", store["copy.png"]):
        assert rows.raws(store.features(row, both)) == {name: whole[name] for name in both}
        assert list(store.features(row, "deepstack_features_0")) == ["deepstack_features_0"]
    os.rename(tmp_path / "shard-000001.parquet", tmp_path / "shard-000002.parquet")
    assert rows.raws(store.features("copy.png", both)) == {name: whole[name] for name in both}
    assert storage.list()


@pytest.mark.parametrize(
    "names", [["pooler_output", "embeds"], "embeds", ["deepstack_features_2"], ("", "pooler_output")]
)
def test_a_name_that_no_tensor_has_is_said_with_those_that_there_are(tmp_path, names):
    rows.write_store(tmp_path, [rows.item("a.png", levels=2)], declared=rows.schema(levels=2))
    with pytest.raises(UsageError, match="has no tensor .*; there are pooler_output, deepstack_features_0, deepstack_"):
        open_store(tmp_path).features("a.png", names)


@pytest.mark.parametrize("names", [[], 7, [7], b"embeds", iter(["pooler_output"])])
def test_names_that_are_none_are_refused(folder, names):
    with pytest.raises(UsageError, match="names: give names of tensors, not "):
        open_store(folder).features("a.png", names)


def test_named_tensors_are_read():
    declared = rows.schema("float32", levels=3)
    pairs = [rows.item(f"{n}.png", dtype="float32", levels=3) for n in range(3)]
    store = read_store(rows.write_store(MemoryStorage(), pairs[:2], pairs[2:], declared=declared))
    assert store.tensors == declared.tensors and store.width == rows.WIDTH
    for row, features in pairs:
        assert rows.raws(store.features(row)) == rows.raws(features)
        assert set(store.features(row)) == {"pooler_output", *(f"deepstack_features_{level}" for level in range(3))}


# ----------------------------------------------------------------------------------------------------- one config


@pytest.mark.parametrize(
    ("declared", "what"),
    [
        (rows.schema("float32"), "storage_dtype: bfloat16, not float32"),
        (rows.schema(levels=1), "tensors: pooler_output 16 bfloat16, not pooler_output 16 bfloat16, deepstack_features_0"),
        (rows.schema(width=8), "tensors: pooler_output 16 bfloat16, not pooler_output 8 bfloat16"),
    ],
)  # fmt: skip
def test_shards_of_two_extraction_configs_are_not_opened_together(declared, what):
    storage = rows.write_store(MemoryStorage(), [rows.item("a.png")])
    rows.write_shard(storage, "shard-000002.parquet", [], declared)
    with pytest.raises(
        ConfigError, match=r"shard-000001\.parquet and .*shard-000002\.parquet.*ask them apart"
    ) as caught:
        read_store(storage)
    assert what in str(caught.value)


def test_provenance_may_differ_and_is_that_of_the_newest_rows():
    storage = MemoryStorage()
    for number, device in enumerate(("cpu", "cuda"), 1):
        declared = rows.schema(provenance=[Provenance("m", None, device, {})])
        rows.write_shard(storage, layout.shard_name(number), [rows.item(f"{device}.png")], declared)
    assert read_store(storage).provenance.device == "cuda"


def test_a_store_without_shards_has_nothing():
    store = store_of()
    assert (store.config, store.tensors, store.provenance, store.width, store.generation) == (None, None, None, None, 0)
    assert (store.rows, len(store), store.roots) == ([], 0, frozenset())


# ----------------------------------------------------------------------------------------------------- opening one


@pytest.fixture
def folder(tmp_path):
    """A store of three shards, with everything beside them that there may be."""
    folder = tmp_path / "embeds"
    storage = rows.write_store(folder, [rows.item("a.png")], [rows.item("b.png")], [(rows.failed("c.png"), None)])
    with storage.lock():
        for name in (f"{layout.QUARANTINE}/shard-000009.parquet", f"{layout.STAGING}/.shard-000004.parquet.1.tmp",
                     f"{layout.REBUILD}/shard-000010.parquet", f"{layout.REBUILD}/{layout.STAGING}/.x.tmp",
                     f"{layout.DAMAGE}/shard-000001.parquet.json", layout.CATALOGUE, layout.HISTORY):  # fmt: skip
            with storage.put_whole(name) as stream:
                stream.write(b"PAR1 and no more")
    return folder


def test_a_folder_a_shard_a_glob_and_several_of_them_are_opened(folder):
    assert [row.path for row in open_store(folder).rows] == ["a.png", "b.png", "c.png"]
    assert [row.path for row in open_store(folder / "shard-000002.parquet").rows] == ["b.png"]
    assert [row.path for row in open_store(f"{folder}/shard-00000[12].parquet").rows] == ["a.png", "b.png"]
    twice = open_store(folder / "shard-000002.parquet", folder, f"{folder}/*.parquet")
    assert [shard.name[-9] for shard in twice.shards] == ["2", "1", "3"]  # each once
    assert twice.name == str(folder)


def test_what_is_no_store_is_said(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no shards"):
        open_store(tmp_path / "empty")
    for place in (tmp_path / "nowhere", f"{tmp_path}/*.nothing", folder / "shard-000001.parquet" / "x"):
        with pytest.raises(UsageError, match="no store or shard at"):
            open_store(place)


def test_a_store_whose_rebuild_is_being_put_in_place_is_not_opened(folder):
    (folder / layout.REBUILD_COMPLETE).write_text('{"first": 10}')
    with pytest.raises(StoreInUse, match="replaced by its rebuild"):
        open_store(folder)
    (folder / layout.REBUILD_COMPLETE).write_text("[" * 100_000)
    with pytest.raises(StoreDamaged, match="cannot be read"):
        open_store(folder)


def test_shards_are_taken_by_number_not_by_name(tmp_path):
    storage = LocalStorage(tmp_path)
    for number in (1_000_000, 999_999, 2):
        rows.write_shard(storage, layout.shard_name(number), [rows.item("a.png", sha256=rows.sha(str(number)))])
    assert open_store(tmp_path).current("/photos", "a.png").sha256 == rows.sha("1000000")
    assert [shard.name for shard in open_store(f"{tmp_path}/*.parquet").shards][-1] == "shard-1000000.parquet"


def test_a_folder_whose_name_is_not_utf_8(tmp_path, folder):
    target = os.fsdecode(os.fsencode(tmp_path) + b"/d\xff")
    shutil.copytree(folder, target)
    assert rows.contents(open_store(target)) == rows.contents(open_store(folder))


@pytest.mark.parametrize("name", fuzz.NEWER)
def test_a_shard_that_a_newer_version_wrote_hides_no_row(folder, name):
    """The store is refused as a whole: rows that this version cannot read may supersede those that it can."""
    (folder / "shard-000004.parquet").write_bytes(fuzz.written(fuzz.NEWER[name]()))
    with pytest.raises(ConfigError, match=r"shard-000004\.parquet.*made by a newer qvsplit"):
        open_store(folder)


# ------------------------------------------------------------------------------------------------- in Python, by hand


def test_it_says_what_it_holds(folder, tmp_path):
    assert repr(open_store(folder)) == f"<Store {folder}: 2 images by qwen2_vl, 1 failed>"
    assert repr(store_of()) == "<Store : empty>"
    with open_store(folder) as store:
        assert store and len(store) == 2 and [row.path for row in store] == ["a.png", "b.png"]
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        store.current("/photos", "a.png")


@pytest.mark.parametrize("place", [None, 5, b"embeds", ["embeds"]], ids=repr)
def test_a_place_that_is_none_is_refused_by_name(place):
    with pytest.raises(UsageError, match="places: give the path of a store, not "):
        open_store(place)
    with pytest.raises(UsageError, match="places: give the path of a store$"):
        open_store()


def test_a_name_does_for_a_row(folder):
    store = open_store(folder)
    assert rows.raws(store.features("a.png")) == rows.raws(store.features(store["a.png"]))
    with pytest.raises(KeyError, match="has no image named z.png"):
        store.features("z.png")
    with pytest.raises(UsageError, match="c.png has no features: it is failed"):
        store.features("c.png")
    with pytest.raises(UsageError, match=r"row: give a row of the store, or its name, not int 5"):
        store.features(5)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_current_rows_are_a_table(tmp_path, dtype):
    own, made = rows.item("a.png", dtype=dtype, levels=1, warnings="odd", taken_at="2024-01-02T03:04:05")
    pairs = [(own, made), (rows.row("copy.png", sha256=own.sha256, has_features=False), None),
             (rows.failed("bad.png"), None), (rows.deleted("gone.png"), None)]  # fmt: skip
    storage = rows.write_store(tmp_path, pairs, declared=rows.schema(dtype, levels=1))
    store = open_store(tmp_path)
    table = store.to_arrow()
    assert table.column_names == list(row_columns())
    assert (
        table.schema
        == pq.read_schema(tmp_path / "shard-000001.parquet")
        .remove_metadata()
        .empty_table()
        .select(table.column_names)
        .schema
    )
    assert [{**one, "grid_thw": one["grid_thw"] and tuple(one["grid_thw"])} for one in table.to_pylist()] == [
        dataclasses.asdict(row) for row in store.rows
    ]
    assert list(store.to_pandas()["path"]) == ["a.png", "bad.png", "copy.png", "gone.png"]
    whole = store.to_arrow(features=True)
    assert whole.column_names == [*table.column_names, "embeds", "deepstack_features_0"]
    first = pq.read_table(tmp_path / "shard-000001.parquet").slice(0, 1)
    for name in ("embeds", "deepstack_features_0"):
        blob = first.column(name)[0].as_py()
        assert whole.column(name).to_pylist() == [blob, None, blob, None]
    assert store.to_pandas(features=True)["embeds"][1] is None
    assert storage.list() != []


def test_a_table_of_many_rows_is_made_in_pieces(folder, monkeypatch):
    expected = open_store(folder).to_arrow()
    monkeypatch.setattr("qvsplit.store.arrow.ROWS_AT_A_TIME", 1)
    assert open_store(folder).to_arrow().equals(expected) and expected.num_rows == 3
    assert store_of().to_arrow().num_rows == 0


# ----------------------------------------------------------------------------------------------------------- parts


def test_a_files_features_are_there_where_those_of_all_its_parts_are():
    """Whatever has become of the item, and in whichever shards they are."""
    clip = rows.parts("c.mp4", 4)
    sha256 = clip[0][0].sha256
    gone = [(rows.deleted(row.path, **{name: getattr(row, name) for name in ("kind", "part", "start", "end", "duration")},
                          generation=2), None) for row, _ in clip]  # fmt: skip
    stores = {
        "as it is": store_of(clip),
        "in two shards": store_of(clip[2:], clip[:2]),
        "deleted": store_of(clip, gone),
        "modified": store_of(clip, rows.parts("c.mp4", 2, generation=2, sha256=rows.sha("c again"))),
        "failed": store_of(clip, [(rows.failed("c.mp4", generation=2, kind="video"), None)]),
    }
    for name, store in stores.items():
        assert [row.part for row in store.home_rows(sha256)] == [0, 1, 2, 3], name
        assert all(store.holds((sha256, part)) for part in (0, 3, 9)), name
        assert store.home((sha256, 9)) is None


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_they_are_not_where_one_is_missing_be_it_the_last(lost):
    """As a quarantined shard leaves them. No row of the item need be left to tell how many there were."""
    clip = rows.parts("c.mp4", 4)
    sha256, some = clip[0][0].sha256, [pair for pair in clip if pair[0].part != lost]
    again = rows.parts("c.mp4", 2, generation=2, sha256=rows.sha("c again"))
    for store in (store_of(some), store_of(some, again), store_of(some, rows.without_features(clip, generation=2))):
        assert store.home_rows(sha256) == [] and not store.holds((sha256, 0)) and not store.holds((sha256, lost))
    found = store_of(rows.without_features(clip, generation=2), some).folder_rows(("/photos", ""))
    assert [(row.part, held) for row, held in found.values()] == [(0, False)]


def test_an_image_and_a_whole_video_have_one_home():
    store = store_of([rows.item("a.png"), rows.item("c.mp4", kind="video", duration=9.0), (rows.failed("x.png"), None)])
    for name in ("a.png", "c.mp4"):
        assert [row.path for row in store.home_rows(rows.sha(name))] == [name] and store.holds((rows.sha(name), 0))
    assert store.home_rows(rows.sha("x.png")) == store.home_rows(None) == []
    assert not store.holds((rows.sha("x.png"), 0)) and not store.holds(None)


def test_features_say_what_they_are_of():
    store = store_of([rows.item("a.png"), *rows.parts("c.mp4", 2)])
    assert [store.features(row).kind for row in store] == ["image", "video", "video"]


def test_the_rows_of_an_item_are_all_its_parts():
    store = store_of([*rows.parts("c.mp4", 3), (rows.failed("bad.mp4", kind="video"), None)])
    assert [row.part for row in store.rows_of("/photos", "c.mp4")] == [0, 1, 2]
    assert store.rows_of("/photos", "none.mp4") == []
    assert {path: (row.part, row.status, held) for (_, path), (row, held) in store.folder_rows(("/photos", "")).items()} == {
        "bad.mp4": (0, "failed", False), "c.mp4": (0, "ok", True),
    }  # fmt: skip


def test_an_item_has_failed_if_any_of_its_parts_has():
    broken = rows.failed("c.mp4", kind="video", part=1, start=1.5, end=3.0, duration=4.5)
    clip = rows.parts("c.mp4", 3)
    store = store_of([clip[0], (broken, None), clip[2]])
    assert store.current("/photos", "c.mp4") == broken
    assert [(row.part, row.status) for row, _ in store.folder_rows(("/photos", "")).values()] == [(1, "failed")]


def test_shards_of_which_some_know_nothing_of_videos_are_one_store():
    images, videos = rows.schema(), rows.schema(config=rows.config(videos=rows.VIDEOS))
    for first, second in ((images, videos), (videos, images), (videos, videos)):
        storage = rows.write_store(MemoryStorage(), [rows.item("a.png")], declared=first)
        rows.write_shard(storage, "shard-000002.parquet", rows.parts("c.mp4", 2), second)
        store = read_store(storage)
        assert store.config == videos.config and len(store) == 3
        assert {rows.raws(store.features(row))["pooler_output"] for row in store}
    assert read_store(rows.write_store(MemoryStorage(), [rows.item("a.png")])).config == images.config


def test_videos_under_two_configs_are_not_opened_together():
    other = rows.schema(config=rows.config(videos={**rows.VIDEOS, "clip_seconds": 10}))
    storage = rows.write_store(MemoryStorage(), [rows.item("a.png")])
    rows.write_shard(storage, "shard-000002.parquet", [], rows.schema(config=rows.config(videos=rows.VIDEOS)))
    rows.write_shard(storage, "shard-000003.parquet", [], other)
    what = r"shard-000002\.parquet and .*shard-000003\.parquet were made .*\(videos\.clip_seconds: 1\.5, not 10\)"
    with pytest.raises(ConfigError, match=what):
        read_store(storage)


def test_the_grid_of_a_video_is_held_against_what_any_shard_says_of_videos(tmp_path):
    """The catalogue has rows of all shards, and the last may know nothing of videos."""
    own = rows.schema(config=rows.config(videos={"settings": {"merge_size": 1}}))
    storage = rows.write_store(tmp_path, [rows.item("c.mp4", 6, kind="video", grid_thw=(2, 3, 1))], declared=own)
    rows.write_shard(storage, "shard-000002.parquet", [rows.item("a.png")])
    assert [row.path for row in open_store(tmp_path)] == ["a.png", "c.mp4"]


def test_features_written_anew_are_found_also_where_videos_came_meanwhile(tmp_path):
    rows.write_store(tmp_path, [rows.item("a.png")])
    store = open_store(tmp_path)
    row, features = rows.item("a.png")
    (tmp_path / "shard-000001.parquet").unlink()
    videos = rows.schema(config=rows.config(videos=rows.VIDEOS))
    rows.write_shard(tmp_path, "shard-000002.parquet", [(row, features), *rows.parts("c.mp4", 2)], videos)
    assert rows.raws(store.features("a.png")) == rows.raws(features)


def test_it_says_how_many_videos_it_holds():
    clips, whole = rows.parts("c.mp4", 3), rows.item("d.mp4", kind="video")
    assert repr(store_of(clips)) == "<Store memory: 1 videos in 3 parts by qwen2_vl>"
    assert repr(store_of([whole])) == "<Store memory: 1 videos by qwen2_vl>"
    failed = (rows.failed("bad.mp4", kind="video"), None)
    assert repr(store_of([*clips, whole, rows.item("a.png"), failed])) == (
        "<Store memory: 1 images and 2 videos in 4 parts by qwen2_vl, 1 failed>"
    )
