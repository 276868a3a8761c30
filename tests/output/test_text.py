"""The lines that commands print."""

from __future__ import annotations

import pytest

from qvsplit.output.text import (
    compacted_line,
    counted_items,
    duration,
    plural,
    preview_lines,
    purged_lines,
    summary_lines,
)
from qvsplit.pipeline.summary import Preview, Summary


def test_one_is_singular():
    assert [plural(number, "image") for number in (0, 1, 2, 1000)] == [
        "0 images",
        "1 image",
        "2 images",
        "1,000 images",
    ]
    assert plural(1, "answer was", "answers were") == "1 answer was"
    assert plural(2, "answer was", "answers were") == "2 answers were"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "a second"), (45, "45 s"), (89, "89 s"), (720, "12 min"), (12_600, "3.5 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_summary_has_the_words_of_the_field():
    done = Summary(
        found=20, to_read=14, encoded=6, new=1, modified=2, re_encoded=3, copied=1, moved=1, metadata_changed=1,
        failed=1, failed_again=1, failed_before=1, unchanged=5, remaining=2, deleted=1, not_found=1, disappeared=1,
        tokens=1, bytes=2000, seconds=1.5, store="embeds", stopped="limit",
    )  # fmt: skip
    assert summary_lines(done.to_json()) == [
        "1 new, 2 modified, 3 re-encoded, 1 copied, 1 moved, 1 metadata changed, 5 unchanged, 1 failed, "
        "1 failed again, 1 failed before, 1 disappeared, 1 deleted, 2 remaining in 1.5 s; embeds",
        "1 token, 2.0 kB written; read 0.0 kB of weights, peak memory 0.0 kB",
        "stopped by `limit`; run the same command again to continue",
        "1 item of the store was not found; `prune=True` marks it as deleted",
    ]


def test_a_summary_says_what_was_video():
    done = Summary(encoded=5, new=5, videos=2, clips=7, video_seconds=720.0, seconds=1.0, store="e")
    assert summary_lines(done.to_json())[1] == "2 of the 5 encoded are videos: 12 min of video, 7 clips"
    done = Summary(encoded=1, new=1, videos=1, clips=1, video_seconds=45.0, seconds=1.0, store="e")
    assert summary_lines(done.to_json())[1] == "1 of the 1 encoded is a video: 45 s of video"
    assert not any("video" in line for line in summary_lines(Summary(encoded=5, seconds=1.0, store="e").to_json()))


def test_items_are_counted_by_kind():
    assert counted_items(0, 0, 0) == "0 images"
    assert counted_items(1, 0, 0) == "1 image"
    assert counted_items(0, 1, 1) == "1 video"
    assert counted_items(2, 1, 12) == "2 images and 12 clips of 1 video"


def test_a_summary_of_nothing():
    assert summary_lines(Summary(seconds=0.1, store="e").to_json()) == ["nothing to do in 0.1 s; e"]
    stopped = Summary(to_read=7, interrupted=True, seconds=0.1, store="e")
    assert summary_lines(stopped.to_json()) == ["0 of 7 done in 0.1 s; e"]


def test_a_preview():
    would = Summary(
        found=3, to_read=2, unchanged=1, not_found=2, preview=Preview(2, 1, 900, 1_000_000, 95.0, "arithmetic")
    )
    assert preview_lines(would.to_json()) == [
        "2 of 3 items would be read, 1 are known and unchanged",
        "2 items of the store were not found",
        "at most 900 tokens, about 1.00 MB on disk, about 2 min (a rough estimate by arithmetic); copies and moved "
        "items cost almost nothing",
        "1 of them would fail: the header cannot be read",
    ]
    unknown = Summary(found=1, to_read=1, preview=Preview(1, 0, 9, None, None, ""))
    assert "time unknown" in preview_lines(unknown.to_json())[1]


def test_compact_and_purge():
    done = {
        "shards_before": 3,
        "shards_after": 1,
        "bytes_before": 3_000_000,
        "bytes_after": 2_000_000,
        "rows_dropped": 1,
    }
    assert compacted_line(done, "embeds") == "3 → 1 shard, 3.00 MB → 2.00 MB, 1 old row dropped; embeds"
    done |= {"purged": 2, "shared": 1, "still_there": 0, "removed_quarantined": 1, "removed_rebuild": True}
    assert list(purged_lines(done, "embeds")) == [
        "2 items purged; 3.00 MB → 2.00 MB; embeds",
        "1 of them: features kept, because other items of the store have the same bytes",
        "an unfinished rebuild, which may have held them, was removed",
        "1 quarantined shard, which may have held them, was removed",
    ]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (1, "1 image lacks pixels, as its file is cut off; `warnings` in its row says how much is missing"),
        (2, "2 images lack pixels, as their files are cut off; `warnings` in their rows says how much is missing"),
    ],
)
def test_a_summary_says_of_how_many_images_pixels_are_missing(number, said):
    assert said in summary_lines(Summary(copied=number, cut_off=number).to_json())
    assert not any("pixels" in line for line in summary_lines(Summary(copied=number).to_json()))
