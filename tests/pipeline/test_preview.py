"""What a run would take, told by headers alone."""

from __future__ import annotations

import os
import shutil
from random import Random

import pytest
from PIL import Image

from qvsplit.errors import ModelError, UsageError
from qvsplit.output.text import preview_lines
from qvsplit.pipeline.preview import TokenCounter, resized
from qvsplit.runtime.dtypes import STORED_SHARE, token_bytes
from qvsplit.store.opening import open_store
from qvsplit.verify import describe
from tests.support.clips import make_clip
from tests.support.every_model import further
from tests.support.extracting import OLD, PHOTOS, add, add_bad, extractor, state
from tests.support.fake_source import InThreadDecoders
from tests.support.families import FAMILIES


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


# ------------------------------------------------------------------------------------------------- other families


def resize(folder, *sizes):
    """Write a photograph in each of these sizes, not fresh."""
    folder.mkdir(exist_ok=True)
    for width, height in sizes:
        with Image.open(PHOTOS["coffee.png"]) as image:
            image.convert("RGB").resize((width, height)).save(folder / f"{width}x{height}.png")
        os.utime(folder / f"{width}x{height}.png", OLD)
    return folder


# of each way to count: patches, tiles, marks between rows, a fixed number
COUNTED = {
    "qwen2_vl",
    "qwen3_vl",
    "llava_onevision",
    "internvl",
    "idefics3",
    "mistral3",
    "minicpmv4_6",
    "lfm2_vl",
    "gemma3",
}


@pytest.mark.parametrize("name", [name if name in COUNTED else pytest.param(name, marks=further) for name in FAMILIES])
def test_tokens_and_bytes_are_those_of_the_run_in_every_family(name, family_checkpoint, tmp_path, out, monkeypatch):
    """Some processors' own count has the marks between rows and tiles as well; some have no such count."""
    monkeypatch.setattr("qvsplit.pipeline.runner.DecoderPool", InThreadDecoders)
    folder = resize(tmp_path / "sizes", (160, 120), (900, 400), (45, 150))
    extract = extractor(str(family_checkpoint(name)), out)
    before = extract(folder, dry_run=True).preview
    ran = extract(folder)
    with open_store(out) as store:
        levels = [spec for spec in store.tensors if spec.level is not None]
        stored = sum(tensor.raw.nbytes for row in store for tensor in store.features(row).tensors.values())
        assert describe(store)["raw_bytes"] == stored == ran.tokens * (1 + len(levels)) * token_bytes("float32", 64)
        assert len(levels) == (2 if name in ("qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe") else 0)
    assert (before.items, before.bad, before.tokens) == (3, 0, ran.tokens)
    assert before.seconds_by == ("arithmetic" if name.startswith("qwen") else "")
    assert before.bytes == round(stored * STORED_SHARE["float32"])
    resize(folder, (500, 500))
    after = extract(folder, dry_run=True).preview
    assert after.tokens == extract(folder).tokens
    assert after.bytes == round(after.tokens * ran.bytes / ran.tokens)


def test_the_stores_own_limits_count(family_checkpoint, tmp_path, out):
    folder = resize(tmp_path / "sizes", (300, 200))
    extract = extractor(str(family_checkpoint("qwen3_vl")), out)
    extract(folder, max_pixels=10_000)
    resize(folder, (600, 400))
    before = extract(folder, dry_run=True).preview
    assert before.tokens == extract(folder).tokens < 10_000 // 32**2


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_a_run_refuses_is_refused_before(dry_run, family_checkpoint, some_photos, out):
    """Images of some families cannot be resized on a device."""
    extract = extractor(str(family_checkpoint("internvl")), out)
    with pytest.raises(UsageError, match="`prepare_on` device is for models whose images are cut into patches"):
        extract(some_photos, prepare_on="device", dry_run=dry_run)


def test_a_size_is_prepared_once(family_checkpoint, tmp_path, monkeypatch, out):
    """Where a processor has no count of its own an image of that size is prepared, which takes a moment."""
    prepared = []
    real = TokenCounter._by_preparing
    monkeypatch.setattr(TokenCounter, "_by_preparing", lambda *args: (prepared.append(args[1:]), real(*args))[1])
    folder = resize(tmp_path / "sizes", (300, 200), (200, 300))
    for copy in ("a.png", "b.png"):
        shutil.copy2(folder / "300x200.png", folder / copy)
    for name, tried in (("lfm2_vl", [(200, 300), (300, 200)]), ("gemma3", [])):
        prepared.clear()
        extractor(str(family_checkpoint(name)), out)(folder, dry_run=True)
        assert sorted(size for size in prepared if size[0] in (200, 300)) == tried


def test_of_a_store_whose_model_is_gone_tokens_may_be_unknown(family_checkpoint, tmp_path, out):
    folder = resize(tmp_path / "sizes", (300, 200))
    model = shutil.copytree(family_checkpoint("llava"), tmp_path / "model")
    extractor(str(model), out)(folder)
    shutil.rmtree(model)
    resize(folder, (200, 200))
    ran = extractor(None, out)(folder, dry_run=True)
    assert (ran.preview.items, ran.preview.tokens, ran.preview.bytes, ran.preview.seconds) == (1, None, None, None)
    assert preview_lines(ran.summary.to_json())[-1].startswith("tokens, bytes and time unknown: ")


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


# --------------------------------------------------------------------------------------------------------- videos


def film(path, count: int, size=(160, 96)):
    make_clip(path, count, size=size)
    os.utime(path, OLD)


def test_tokens_of_videos_are_those_of_the_run(family_checkpoint, tmp_path, out):
    """Of every clip of each, in the way that the options say, then in the store's own; and a GIF is what it is there."""
    folder = resize(tmp_path / "shown", (300, 200))
    film(folder / "long.mp4", 90)
    film(folder / "small.mkv", 20, (96, 64))
    (folder / "torn.mp4").write_bytes((folder / "long.mp4").read_bytes()[:3000])
    colours = [Image.new("RGB", (64, 64), (0, 0, number)) for number in range(9)]
    colours[0].save(folder / "a.gif", save_all=True, append_images=colours[1:], duration=200)
    for name in ("torn.mp4", "a.gif"):
        os.utime(folder / name, OLD)
    extract = extractor(str(family_checkpoint("qwen2_5_vl")), out)
    for how in ({"clip_seconds": 1.0, "video_max_tokens": 30, "gif": "video"}, {}):
        before = extract(folder, dry_run=True, **how).preview
        ran = extract(folder, **how)
        assert (before.items, before.bad, before.tokens) == (5 if how else 2, 1 if how else 0, ran.tokens)
        assert ran.clips == (4 + 1 + 2 if how else 2 + 2)
        film(folder / "more.mp4", 50)
        colours[0].save(folder / "b.gif", save_all=True, append_images=colours[1:], duration=220)
        os.utime(folder / "b.gif", OLD)


def test_videos_that_are_left_out_or_that_no_model_takes_are_bad(family_checkpoint, tmp_path, out):
    folder = resize(tmp_path / "shown", (300, 200))
    film(folder / "clip.mp4", 20)
    extract = extractor(str(family_checkpoint("qwen2_5_vl")), out)
    assert extract(folder, dry_run=True, videos=False).preview.items == 1
    named = extract(folder, folder / "clip.mp4", dry_run=True, videos=False)
    alone = extract(folder / "300x200.png", dry_run=True)
    assert (named.preview.items, named.preview.bad, named.preview.tokens) == (2, 1, alone.preview.tokens)
    before = extractor(str(family_checkpoint("llava")), out)(folder, dry_run=True).preview
    ran = extractor(str(family_checkpoint("llava")), out)(folder)
    assert (before.items, before.bad, before.tokens) == (2, 1, ran.tokens)
    assert (ran.encoded, ran.failed) == (1, 1)
    ((path, reason),) = ran.failures
    assert path == "clip.mp4"
    assert reason == "is a video: llava models take no videos; `videos=False` leaves videos out"
    with open_store(out) as store:
        (row,) = store.matching("clip.mp4")
        assert (row.status, row.kind, row.part, row.error) == ("failed", "video", 0, reason)
        assert (row.width, row.height, row.duration) == (160, 96, 0.8)
        assert store.config.videos is None
