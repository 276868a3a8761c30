"""Every family through the whole way: identical to its full model in every column, as docs/models.md says."""

from __future__ import annotations

import pytest

from qvsplit.checkpoints.families import FAMILIES as LISTED
from qvsplit.checkpoints.model_class import full_class, takes_videos
from tests.support.columns import REFUSED
from tests.support.every_model import further
from tests.support.families import ALL
from tests.support.families.qwen import QWEN
from tests.support.matrix import PARTS, SPLIT, families_in_docs, matrix_row, rows_in_docs
from tests.support.video_costs import minute_row
from tests.support.video_matrix import NO, VideoRow, video_row

# One of each way to answer, and of several tensors, recurrent layers and refusals. Each column of all FAMILIES is held
# against the full model by itself: features and strictness in test_families.py, prompts in test_prompt_families.py,
# answers about one and several images, behind prefixes, and scores in test_ways.py.
QUICK = ["qwen2_vl", "qwen3_vl", "qwen3_5", "gemma3", "paligemma", "llava_onevision"]
WITH_VIDEOS = [one.model_type for one in QWEN[:6]]
QUICK_WITH_VIDEOS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]
ONE_VIDEO_ONLY = {"llava_onevision", "molmo2"}
ONE_KIND_ONLY = {"glm4v", "glm4v_moe", "glm46v", "glm_ocr", "molmo2"}


def some(names, quick):
    """Those that are run always, and those that are run when asked to."""
    return [name if name in quick else pytest.param(name, marks=further) for name in names]


@pytest.fixture
def made(family_checkpoint, family_reference):
    return lambda name: (family_checkpoint(name), family_reference(name))


@pytest.mark.parametrize("name", some(SPLIT, QUICK))
def test_a_family_is_identical_to_its_full_model(name, tmp_path, made):
    row = matrix_row(name, tmp_path, made(name))
    assert row.is_identical, row
    assert (row.several_images == REFUSED) == (name == "llava_onevision")
    assert rows_in_docs("images")[name] == str(row)  # python -m tests.support.matrix write


@pytest.mark.parametrize("name", some(SPLIT, QUICK_WITH_VIDEOS))
def test_a_familys_videos_are_identical_to_its_full_models(name, tmp_path, made):
    row = video_row(name, tmp_path, made(name))
    assert row.is_identical or row.features.startswith(NO), row
    assert row.several.startswith(REFUSED) == (name in ONE_VIDEO_ONLY)
    assert row.mixed.startswith(REFUSED) == (name in ONE_KIND_ONLY)
    assert rows_in_docs("videos")[name] == str(row)


@pytest.mark.parametrize("name", some(families_in_docs("minutes"), WITH_VIDEOS))
def test_a_minute_of_video_costs_what_the_docs_say(name, tmp_path, made):
    assert rows_in_docs("minutes")[name] == str(minute_row(name, tmp_path, made(name)))


@pytest.mark.parametrize("part", PARTS)
def test_the_docs_list_these_families_and_no_others(part):
    assert sorted(rows_in_docs(part)) == sorted(families_in_docs(part))


def test_the_docs_list_families_in_one_order():
    assert list(rows_in_docs("images")) == SPLIT
    assert list(rows_in_docs("minutes")) == families_in_docs("minutes")
    assert set(WITH_VIDEOS) < set(families_in_docs("minutes"))


def test_the_docs_say_which_classes_have_no_features_of_videos(tmp_path):
    without = [name for name, row in rows_in_docs("videos").items() if row == str(VideoRow(name, NO))]
    families = {name: LISTED[ALL[name].model_type] for name in SPLIT}
    classes = {name: full_class(one.model_type, tmp_path, one.model_class) for name, one in families.items()}
    assert without == [name for name in SPLIT if not takes_videos(classes[name])]
