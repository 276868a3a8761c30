"""The extraction config decides what may be used together; provenance only says where rows came from."""

from __future__ import annotations

import json

import pytest

from qvsplit.errors import ConfigError, StoreDamaged
from qvsplit.store.config import ExtractionConfig, Provenance
from tests.support import rows


def read(**changes) -> ExtractionConfig:
    content = json.loads(json.dumps(rows.config().to_json())) | changes
    return ExtractionConfig.from_json(content, "x.parquet")


def test_it_comes_back_from_json():
    assert read() == rows.config()


@pytest.mark.parametrize(
    "changes",
    [
        {"surprise": 1},
        {"kernels": "quantum"},
        {"compute_dtype": "float8"},
        {"storage_dtype": "int4"},
        {"processor": rows.PROCESSOR | {"prepared_on": "tpu"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_value_that_is_unknown_was_made_by_a_newer_version(changes):
    with pytest.raises(ConfigError, match=r"x\.parquet was made by a newer qvsplit .*; upgrade") as caught:
        read(**changes)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "changes",
    [{"family": None}, {"encoder": 7}, {"kernels": []}, {"processor": []}, {"images": None},
     {"processor": rows.PROCESSOR | {"merge_size": 0}}, {"processor": rows.PROCESSOR | {"merge_size": True}},
     {"processor": rows.PROCESSOR | {"min_pixels": "few"}}, {"processor": {"merge_size": 2, "min_pixels": 5}},
     {"processor": {"merge_size": "2"}}, {"processor": {"merge_size": 65}}],
    ids=str,
)  # fmt: skip
def test_a_value_of_another_type_is_damage(changes):
    with pytest.raises(StoreDamaged, match=r"x\.parquet has no usable extraction config"):
        read(**changes)


def test_a_field_that_is_missing_is_damage():
    for name in rows.config().to_json():
        content = rows.config().to_json()
        del content[name]
        with pytest.raises(StoreDamaged):
            ExtractionConfig.from_json(content, "x.parquet")


def test_a_family_that_merges_no_patches_needs_no_such_settings():
    assert read(processor={"size": [8, 8]}).merge_size == 1


def test_a_family_that_merges_patches_may_have_no_pixel_limits():
    assert read(processor={"merge_size": 2, "max_patches": 200}).merge_size == 2


def test_differences_are_named_also_within_the_processor():
    mine, other = rows.config(), rows.config("float32", processor=rows.PROCESSOR | {"max_pixels": 5})
    assert mine.differences(mine) == []
    assert mine.differences(other) == [
        "processor.max_pixels: 1003520, not 5", "storage_dtype: bfloat16, not float32"
    ]  # fmt: skip


def test_a_tuple_and_the_list_that_json_makes_of_it_do_not_differ():
    mine = rows.config(processor=rows.PROCESSOR | {"image_mean": (0.5, 0.5)})
    assert mine.differences(rows.config(processor=rows.PROCESSOR | {"image_mean": [0.5, 0.5]})) == []


def test_provenance_of_the_same_content_has_the_same_id():
    one = Provenance("m", "r", "cpu", {"torch": "2", "pillow": "11"})
    assert one.id == Provenance("m", "r", "cpu", {"pillow": "11", "torch": "2"}).id
    others = [Provenance("n", "r", "cpu", one.versions), Provenance("m", None, "cpu", one.versions),
              Provenance("m", "r", "cuda", one.versions), Provenance("m", "r", "cpu", {"torch": "2"})]  # fmt: skip
    assert len({one.id, *(other.id for other in others)}) == 5
    assert len(one.id) == 16 and one.to_json()["id"] == one.id


@pytest.mark.parametrize("content", [None, 7, [], {"model": 7, "revision": 7, "versions": [1]}, {"versions": {"a": 1}}])
def test_provenance_is_read_whatever_is_there(content):
    read = Provenance.from_json(content)
    assert isinstance(read.model, str) and read.revision is None
    assert Provenance.from_json(read.to_json()) == read


# ---------------------------------------------------------------------------------------------------------- videos


def test_what_is_said_of_videos_comes_back_and_may_be_missing():
    assert "videos" not in rows.config().to_json()  # as before there were any: also for whoever hashes it
    assert read(videos=rows.VIDEOS) == rows.config(videos=rows.VIDEOS)
    assert read(videos=rows.VIDEOS).to_json()["videos"] == rows.VIDEOS
    assert read(videos=None) == read() == rows.config()


@pytest.mark.parametrize(
    "videos",
    [[], "whole", 7, True, {"settings": None}, {"settings": []}, {"settings": {"merge_size": 0}},
     {"containers": []}, {"containers": {"pooler_output": 7}}, {"settings": {"merge_size": True}}, {"settings": {"merge_size": "2"}}, {"settings": {"merge_size": 10**100}},
     {"fps": "2"}, {"fps": 0}, {"max_tokens": True}, {"clip_seconds": [5]}, {"max_frames": -1}, {"patches_a_token": "4"}],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_said_of_videos_is_damage(videos):
    with pytest.raises(StoreDamaged, match=r"x\.parquet has no usable extraction config"):
        read(videos=videos)


def test_where_one_knows_nothing_of_videos_it_goes_with_any_other():
    without, one, other = (rows.config(videos=videos) for videos in (None, rows.VIDEOS, {**rows.VIDEOS, "rule": 2}))
    for mine in (without, one):
        for theirs in (without, one):
            assert mine.fits(theirs) and mine.differences(theirs) == []
    assert not one.fits(other) and one.differences(other) == ["videos.rule: 1, not 2"]
    assert one.differences(rows.config("float32")) == ["storage_dtype: bfloat16, not float32"]
    assert without.merged(one) == one.merged(without) == one and without.merged(without) == without


def test_the_merge_size_of_a_video_may_be_its_own():
    own = rows.config(videos={"settings": {"merge_size": 4}})
    assert (own.merge_size_of("image"), own.merge_size_of("video")) == (2, 4)
    for videos in (None, {}, {"settings": {}}):
        assert rows.config(videos=videos).merge_size_of("video") == 2


def test_what_is_said_of_videos_decides_the_features_of_no_image():
    own = rows.config(videos=rows.VIDEOS)
    assert own.for_kinds(["image", "image"]) == rows.config()
    assert own.for_kinds({"image", "video"}) == own.for_kinds(["video"]) == own
