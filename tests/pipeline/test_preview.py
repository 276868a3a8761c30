"""What a run would take, told by headers alone."""

from __future__ import annotations

import shutil
from random import Random

import pytest

from qvsplit.errors import ModelError
from qvsplit.pipeline.preview import resized
from tests.support.extracting import add, add_bad, extractor, state


def test_a_dry_run_changes_nothing(extract_with_model, some_photos, out):
    ran = extract_with_model(some_photos, dry_run=True)
    assert (ran.to_read, ran.found, ran.preview.items) == (4, 4, 4)
    assert not out.exists()


def test_a_dry_run_counts_tokens_as_the_run_then_has_them(extract_with_model, some_photos, photos, out):
    shutil.copy(photos / "turned.jpg", some_photos)
    add_bad(some_photos, "bad.png")
    before = extract_with_model(some_photos, dry_run=True)
    assert not out.exists()
    assert (before.to_read, before.preview.items, before.preview.bad) == (6, 6, 1)
    assert before.preview.seconds_by == "arithmetic"
    assert before.preview.seconds > 0
    ran = extract_with_model(some_photos)
    assert before.preview.tokens == ran.tokens
    assert 0.6 < before.preview.bytes / ran.bytes < 1.6


def test_a_dry_run_goes_by_earlier_runs_where_there_are_some(extract, some_photos, out):
    for number in range(9):
        add(some_photos, f"{number}.png", shift=number)
    ran = extract(some_photos)
    before = state(out)
    assert extract(some_photos, dry_run=True).preview is None  # there is nothing to do
    (some_photos / "more.png").write_bytes((some_photos / "8.png").read_bytes() + b" ")
    after = extract(some_photos, dry_run=True)
    assert (after.to_read, after.preview.seconds_by) == (1, "earlier runs")
    assert after.preview.bytes < ran.bytes
    assert state(out) == before


def test_of_a_store_whose_model_is_gone_seconds_are_left_open(extract, some_photos):
    extract(some_photos, limit=3)  # too few to go by
    preview = extract(some_photos, dry_run=True).preview
    assert (preview.items, preview.seconds, preview.seconds_by) == (1, None, "")


def test_a_new_store_needs_a_model_that_can_be_read(some_photos, tmp_path, out):
    with pytest.raises(ModelError):
        extractor(str(tmp_path / "nowhere"), out)(some_photos, dry_run=True)
    assert not out.exists()


def test_the_rule_of_sizes_is_the_processors():
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    chance = Random(0)
    for _ in range(3000):
        height, width = chance.randint(1, 6000), chance.randint(1, 6000)
        if max(height, width) > 199 * min(height, width):
            continue
        low, high = chance.choice([(3136, 1003520), (784, 784 * 4), (100_000, 2_000_000)])
        theirs = smart_resize(height, width, factor=28, min_pixels=low, max_pixels=high)
        assert resized(height, width, 28, low, high) == tuple(theirs), (height, width)
