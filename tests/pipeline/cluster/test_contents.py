"""Who encodes which content: one item each, whoever asks and however often, and none that the store holds."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from qvsplit.pipeline.cluster.contents import Contents
from qvsplit.store import layout
from qvsplit.store.opening import open_store
from qvsplit.store.storage import LocalStorage
from tests.support import rows

HELD = [rows.item("held.png"), *rows.parts("held.mp4", 3), (rows.failed("failed.png"), None)]


@pytest.fixture
def store(tmp_path) -> Path:
    """A store with an image and a video, as it is when a run begins: its catalogue is published."""
    folder = tmp_path / "store"
    rows.write_store(folder, HELD)
    with LocalStorage(folder).lock():
        assert open_store(folder).holds((rows.sha("held.png"), 0))
    return folder


@pytest.fixture
def empty(tmp_path) -> Contents:
    return Contents(str(tmp_path / "nothing"))


def test_whoever_asks_first_encodes_it_and_nobody_else(empty):
    assert empty.claim(rows.sha("a"), 3)
    assert not empty.claim(rows.sha("a"), 0)
    assert not empty.claim(rows.sha("a"), 4)
    assert empty.claim(rows.sha("b"), 4)


def test_asked_again_it_answers_the_same(empty):
    """A reader that has died asks again, as another process."""
    answers = {number: empty.claim(rows.sha("a"), number) for number in (5, 6)}
    for _ in range(3):
        assert {number: empty.claim(rows.sha("a"), number) for number in (6, 5)} == answers == {5: True, 6: False}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_in_any_order_each_content_has_one_owner(empty, order):
    asked = [(content, 3 * content + number) for number in order for content in range(4)]
    owners = [number for content, number in asked if empty.claim(rows.sha(f"{content}"), number)]
    assert sorted(owners) == [3 * content + order[0] for content in range(4)]


def test_an_item_of_number_0_is_an_owner_too(empty):
    assert empty.claim(rows.sha("a"), 0)
    assert empty.claim(rows.sha("a"), 0)
    assert not empty.claim(rows.sha("a"), 1)


def test_what_was_released_is_encoded_by_whoever_asks_next(empty):
    """Its first owner has failed, for a reason that may be its own: another name of the same bytes may fare better."""
    assert empty.claim(rows.sha("a"), 0) and empty.claim(rows.sha("b"), 1)
    empty.release(rows.sha("a"))
    assert [empty.claim(rows.sha("a"), number) for number in (4, 0, 4)] == [True, False, True]
    assert [empty.claim(rows.sha("b"), number) for number in (4, 1)] == [False, True]
    empty.release(rows.sha("a"))
    assert empty.claim(rows.sha("a"), 0)


def test_what_nobody_has_is_released_all_the_same(empty, store):
    """An item fails before anybody was asked, or the driver says so twice."""
    empty.release(rows.sha("a"))
    assert empty.claim(rows.sha("a"), 1)
    contents = Contents(str(store))
    contents.release(rows.sha("held.png"))
    assert not contents.claim(rows.sha("held.png"), 1)  # the store has it


@pytest.mark.parametrize("name", ["held.png", "held.mp4"])
def test_what_the_store_holds_is_nobodys(store, name):
    contents = Contents(str(store))
    assert [contents.claim(rows.sha(name), number) for number in (1, 1, 2)] == [False] * 3


def test_a_video_of_which_a_part_was_lost_is_encoded_again(store):
    """As on one machine: what is not held by the catalogue as a whole would be waited for."""
    first, _, last = rows.parts("torn.mp4", 3)
    rows.write_shard(LocalStorage(store), "shard-000002.parquet", [first, last])
    contents = Contents(str(store))
    assert contents.claim(rows.sha("torn.mp4"), 1)
    assert not contents.claim(rows.sha("torn.mp4"), 2)
    assert not open_store(store).holds((rows.sha("torn.mp4"), 0))


def test_what_failed_before_is_not_held(store):
    contents = Contents(str(store))
    assert contents.claim(rows.sha("failed.png"), 1)
    assert contents.claim(rows.sha("new.png"), 2)


def test_shards_that_come_meanwhile_change_no_answer(store):
    """They are this run's own: whoever has encoded one may ask again."""
    contents = Contents(str(store))
    assert contents.claim(rows.sha("new.png"), 7)
    rows.write_shard(LocalStorage(store), "shard-000002.parquet", [rows.item("new.png"), rows.item("other.png")])
    assert contents.claim(rows.sha("new.png"), 7)
    assert not contents.claim(rows.sha("new.png"), 8)


@pytest.mark.parametrize("is_published", [True, False])
def test_no_catalogue_is_published_by_it(store, is_published):
    """Only the holder of the store's lock does that."""
    published = store / layout.CATALOGUE
    if not is_published:
        published.unlink()
    before = sorted((str(path), path.stat().st_mtime_ns) for path in store.rglob("*"))
    assert not Contents(str(store)).claim(rows.sha("held.png"), 1)
    assert sorted((str(path), path.stat().st_mtime_ns) for path in store.rglob("*")) == before
    assert published.exists() == is_published


def test_a_catalogue_of_other_shards_is_not_believed(store):
    rows.write_shard(LocalStorage(store), "shard-000002.parquet", [rows.item("new.png")])
    assert not Contents(str(store)).claim(rows.sha("new.png"), 1)


def test_where_there_is_no_store_yet_none_is_made(tmp_path):
    assert Contents(str(tmp_path / "nothing")).claim(rows.sha("a"), 1)
    assert list(tmp_path.iterdir()) == []
