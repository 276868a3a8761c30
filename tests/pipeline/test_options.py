"""What an extraction may be told, by tables."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from qvsplit.commands.options import parse_duration
from qvsplit.errors import ConfigError, UsageError
from qvsplit.models.sampling import Sampling, VideoOptions
from qvsplit.pipeline.options import (
    ExtractOptions,
    check_against,
    check_options,
    encoders_of,
    like,
    video_options,
    with_videos_of,
)
from qvsplit.sources.images import IMAGE_POLICY
from qvsplit.store.config import Provenance
from tests.support.fake_encoder import fake_config

CONFIG = fake_config("bfloat16", "reference")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": "float8"}, "`dtype` float8: choose one of float32"),
        ({"storage_dtype": "int4"}, "`storage_dtype` int4: choose one of float32"),
        ({"kernels": "quick"}, "`kernels` quick: choose one of fused, reference"),
        ({"prepare_on": "cuda"}, "`prepare_on` cuda: choose one of cpu, device"),
        ({"workers": 0}, "`workers` must be at least 1"),
        ({"patch_budget": 0}, "`patch_budget` must be at least 1"),
        ({"limit": -1}, "`limit` must be at least 1"),
        ({"checksum": True, "limit": 1}, "`checksum` reads everything"),
        ({"checksum": True, "max_runtime": 1.0}, "`checksum` reads everything"),
    ],
)
def test_what_no_store_can_be_made_with(extract, tmp_path, options, expected):
    with pytest.raises(UsageError, match=expected):
        check_options(ExtractOptions(**options))
    with pytest.raises(UsageError, match=expected):  # before a path is looked at
        extract(tmp_path / "nowhere", **options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, None), ("1", (1, 1)), ("2", (2, 2)), ("1:4", (1, 4)), ("3:3", (3, 3)), (" 2 : 8 ", (2, 8))],
)
def test_how_many_encoders_a_cluster_has(monkeypatch, text, expected):
    monkeypatch.setitem(sys.modules, "ray", sys)  # any module: whether it is installed is not what is asked
    options = ExtractOptions(ray="auto", ray_encoders=text)
    check_options(options)
    assert encoders_of(options) == expected


@pytest.mark.parametrize("text", ["0", "4:1", "x", "0:3", "-1", "", ":", "1:", ":4", "1:4:9", "1.5", "1:x", "2-4"])
def test_how_many_encoders_no_cluster_has(extract, tmp_path, text):
    for refused in (check_options, encoders_of):
        with pytest.raises(UsageError, match=f"^`ray_encoders` {text}: give a number, or MIN:MAX, from 1 on$"):
            refused(ExtractOptions(ray="auto", ray_encoders=text))
    with pytest.raises(UsageError, match="^`ray_encoders`"):  # before a path is looked at
        extract(tmp_path / "nowhere", ray="auto", ray_encoders=text)


def test_encoders_of_no_cluster_are_refused(extract, tmp_path):
    """Rather than passed over, where somebody believes that they are there."""
    for refused in (
        lambda: check_options(ExtractOptions(ray_encoders="2")), lambda: extract(tmp_path / "nowhere", ray_encoders="2"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match="^`ray_encoders` is of a Ray cluster: give `ray` as well$") as caught:
            refused()
        assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "value"), [("ray", True), ("ray", 6379), ("ray_encoders", 2), ("ray_encoders", (1, 4))]
)
def test_what_is_said_of_a_cluster_is_text(name, value):
    with pytest.raises(UsageError, match=f"^{name}: give a text"):
        check_options(ExtractOptions(**{"ray": "auto", name: value}))


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "float16"}, {"storage_dtype": "int8"}, {"kernels": "reference"}, {"workers": 1, "limit": 1}],
)
def test_what_can_be(options):
    check_options(ExtractOptions(**options))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": "float16"}, "`dtype` float16 instead of float32"),
        ({"storage_dtype": "float32"}, "`storage_dtype` float32 instead of bfloat16"),
        ({"kernels": "fused"}, "`kernels` fused instead of reference"),
        ({"prepare_on": "device"}, "`prepare_on` device instead of cpu"),
        ({"prepare_on": "cpu"}, None),
        ({"min_pixels": 1}, "`min_pixels` 1 instead of 3136"),
        ({"max_pixels": 1}, "`max_pixels` 1 instead of 1003520"),
        ({}, None),
        ({"dtype": "float32", "storage_dtype": "bfloat16", "kernels": "reference", "min_pixels": 3136}, None),
    ],
)
def test_what_a_store_can_be_continued_with(options, expected):
    if expected is None:
        check_against(ExtractOptions(**options), CONFIG, "embeds")
        return
    with pytest.raises(
        ConfigError, match=f"^embeds was made under another extraction config.*{expected}.*`rebuild=True`"
    ):
        check_against(ExtractOptions(**options), CONFIG, "embeds")


@pytest.mark.parametrize(
    "images",
    [
        {**IMAGE_POLICY, "transparency": "over white", "deep_colour": "high byte; 32-bit greys stretched"},
        {**IMAGE_POLICY, "ends": "cut off"},
        {name: rule for name, rule in IMAGE_POLICY.items() if name != "deep_colour"},
    ],
)
def test_a_store_of_other_rules_for_images_cannot_be_continued(images):
    """Whatever is asked for: what it holds of a file that has not changed may be of other pixels."""
    with pytest.raises(ConfigError, match=r"^embeds was made when .* by other rules \(.*\); .*`rebuild=True`"):
        check_against(ExtractOptions(), replace(CONFIG, images=images), "embeds")


@pytest.mark.parametrize(
    ("provenance", "options", "changes"),
    [
        (Provenance("m", None, "cpu", {}), {}, {"model": "m"}),
        (Provenance("m", "abc", "cpu", {}), {}, {"model": "m@abc"}),
        (Provenance("m", None, "cpu", {}), {"model": "n", "storage_dtype": "int8"}, {"model": "n", "storage_dtype": "int8"}),
        (Provenance("m", None, "cpu", {}), {"kernels": "fused", "max_pixels": 7}, {"model": "m", "kernels": "fused", "max_pixels": 7}),
        (Provenance("m", None, "cpu", {}), {"workers": 3, "rebuild": True}, {"model": "m", "workers": 3, "rebuild": True}),
    ],
)  # fmt: skip
def test_a_rebuild_is_like_the_store_where_nothing_else_is_said(provenance, options, changes):
    own = ExtractOptions(
        dtype="float32", storage_dtype="bfloat16", kernels="reference", min_pixels=3136, max_pixels=1003520
    )
    assert like(CONFIG, provenance, ExtractOptions(**options)) == replace(own, **changes)


def test_a_rebuild_stores_what_it_computes_where_the_store_did():
    """So that another --dtype alone is another dtype on the disk."""
    options = like(fake_config(), Provenance("m", None, "cpu", {}), ExtractOptions(dtype="bfloat16"))
    assert (options.dtype, options.storage_dtype) == ("bfloat16", None)


@pytest.mark.parametrize(
    ("text", "seconds"), [("45s", 45), ("90m", 5400), ("2h30m", 9000), ("1h", 3600), ("7", 7), ("1.5", 1.5)]
)
def test_durations(text, seconds):
    assert parse_duration(text, "--max-runtime") == seconds


@pytest.mark.parametrize("text", ["", "h", "tomorrow", "-5", "5d"])
def test_durations_that_are_none(text):
    with pytest.raises(UsageError, match="--max-runtime"):
        parse_duration(text, "--max-runtime")


VIDEOS = {
    "fps": 2.0, "max_frames": 768, "num_frames": None, "max_pixels": 9000, "max_tokens": 300, "clip_seconds": None,
    "gif": "image",
}  # fmt: skip
OWN = {"fps": 2.0, "max_frames": 768, "video_max_pixels": 9000, "video_max_tokens": 300, "gif": "image"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"fps": 1.0}, "`fps` 1.0 instead of 2.0"),
        ({"max_frames": 9}, "`max_frames` 9 instead of 768"),
        ({"num_frames": 8}, "`num_frames` 8 instead of None"),
        ({"video_max_pixels": 300}, "`video_max_pixels` 300 instead of 9000"),
        ({"video_max_tokens": 9000}, "`video_max_tokens` 9000 instead of 300"),
        ({"clip_seconds": 3.0}, "`clip_seconds` 3.0 instead of 0"),
        ({"gif": "video"}, "`gif` video instead of image"),
        ({}, None),
        (OWN, None),
        ({"clip_seconds": 0}, None),
    ],
)
def test_how_the_videos_of_a_store_can_be_continued(options, expected):
    check_against(ExtractOptions(**options), CONFIG, "embeds")  # of a store without videos: in any way
    config = replace(CONFIG, videos=VIDEOS)
    if expected is None:
        check_against(ExtractOptions(**options), config, "embeds")
        return
    with pytest.raises(ConfigError, match=rf"^embeds was made under another extraction config \({expected}\)"):
        check_against(ExtractOptions(**options), config, "embeds")


def test_videos_are_looked_at_as_options_say_else_as_the_store_does_else_by_default():
    config = replace(CONFIG, videos=VIDEOS | {"clip_seconds": 4.0})
    chosen = ExtractOptions(
        fps=3.0, max_frames=10, video_max_pixels=1, video_max_tokens=2, clip_seconds=5.0, gif="video"
    )
    assert video_options(chosen) == VideoOptions(Sampling(3.0, 10, None, 5.0), 1, 2, "video")
    assert video_options(with_videos_of(config, chosen)) == video_options(chosen)
    assert video_options(ExtractOptions(num_frames=8)).sampling.num_frames == 8
    assert video_options(ExtractOptions()) == VideoOptions()
    assert with_videos_of(CONFIG, ExtractOptions()) == with_videos_of(None, ExtractOptions()) == ExtractOptions()
    own = with_videos_of(config, ExtractOptions(workers=3))
    assert own == ExtractOptions(workers=3, clip_seconds=4.0, **OWN)
    whole = with_videos_of(config, ExtractOptions(clip_seconds=0))
    assert video_options(whole).sampling.clip_seconds is None
    # a rebuild that says one of both ways to choose frames has not the other as well
    assert with_videos_of(config, ExtractOptions(num_frames=8)).fps is None
    numbers = replace(CONFIG, videos=VIDEOS | {"fps": None, "num_frames": 8})
    assert with_videos_of(numbers, ExtractOptions(fps=1.0)).num_frames is None
    assert with_videos_of(numbers, ExtractOptions()).num_frames == 8
