"""Videos through an extraction, with a fake encoder and fake decoders: slices, parts, their whole life, failures."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from qvsplit.errors import ConfigError, ItemError, UsageError
from qvsplit.pipeline import parts as parts_module
from qvsplit.pipeline import stages
from qvsplit.sources.files import CHANGED
from qvsplit.store.opening import open_store
from tests.support.extracting import OLD
from tests.support.fake_encoder import FakeEncoder
from tests.support.fake_source import InThreadDecoders, fake_video


@pytest.fixture
def folder(tmp_path, some_photos):
    """Four photographs, and a video of 3 s, all with a time that is trusted."""
    put(some_photos / "clip.mp4", fake_video(6, fps=2.0))
    return some_photos


def put(file, data: bytes) -> None:
    file.write_bytes(data)
    os.utime(file, OLD)


def grey(features) -> list[int]:
    """The grey of each frame, of which every token has one value."""
    return [round(float(value) * 255) for value in dict.fromkeys(features["pooler_output"][:, 0].tolist())]


def test_a_video_becomes_one_row_beside_those_of_images(extract, folder, out):
    summary = extract(folder)
    assert (summary.encoded, summary.videos, summary.clips, summary.video_seconds) == (5, 1, 1, 3.0)
    store = open_store(out)
    row = store["clip.mp4"]
    assert (row.kind, row.part, row.start, row.end, row.duration) == ("video", 0, None, None, 3.0)
    assert (row.width, row.height, row.status) == (80, 60, "ok")
    assert row.grid_thw[0] == 6
    media = json.loads(row.media)
    assert (media["frames_indices"], media["n_frames"], media["fps"], media["codec"]) == (
        [0, 1, 2, 3, 4, 5],
        6,
        2.0,
        "fake",
    )
    features = store.features(row)
    assert features.kind == "video"
    assert grey(features) == [0, 10, 20, 30, 40, 50]
    assert store["coffee.png"].kind == "image"
    assert extract(folder).did_anything is False


def test_slices_of_a_video_go_through_the_encoder_in_bounded_batches(extract, fake_model, folder):
    summary = extract(folder, patch_budget=20)
    assert summary.encoded == 5
    assert max(map(sum, fake_model.batches)) <= max(20, max(map(max, fake_model.batches)))
    assert sum(map(len, fake_model.batches)) == 4 + 6


def test_a_video_is_cut_into_parts_that_know_their_seconds(extract, folder, out):
    summary = extract(folder, clip_seconds=1.0)
    assert (summary.encoded, summary.videos, summary.clips) == (5, 1, 3)
    store = open_store(out)
    rows = store.matching("clip.mp4")
    assert [(row.part, row.start, row.end, row.duration) for row in rows] == [
        (0, 0.0, 1.0, 3.0), (1, 1.0, 2.0, 3.0), (2, 2.0, 3.0, 3.0)
    ]  # fmt: skip
    assert [grey(store.features(row)) for row in rows] == [[0, 10], [20, 30], [40, 50]]
    assert len({row.generation for row in rows}) == 1
    assert extract(folder).did_anything is False  # by the store's own seconds


def test_its_parts_go_with_it_through_its_whole_life(extract, folder, out):
    extract(folder, clip_seconds=1.0)
    shutil.copyfile(folder / "clip.mp4", folder / "copy.mov")
    os.utime(folder / "copy.mov", OLD)
    assert extract(folder).copied == 1
    store = open_store(out)
    assert [row.part for row in store.matching("copy.mov")] == [0, 1, 2]
    assert grey(store.features(store.matching("copy.mov")[2])) == [40, 50]

    (folder / "clip.mp4").rename(folder / "moved.mp4")
    summary = extract(folder)
    assert (summary.moved, summary.encoded) == (1, 0)
    store = open_store(out)
    assert [(row.path, row.part) for row in store if row.kind == "video"] == [
        (name, part) for name in ("copy.mov", "moved.mp4") for part in range(3)
    ]

    os.utime(folder / "moved.mp4", (OLD[0] + 60, OLD[1] + 60))
    assert extract(folder).metadata_changed == 1
    assert {row.mtime_ns for row in open_store(out).matching("moved.mp4")} == {int((OLD[1] + 60) * 1e9)}

    put(folder / "moved.mp4", fake_video(4, fps=2.0))
    assert extract(folder).modified == 1
    store = open_store(out)
    assert [(row.start, row.end) for row in store.matching("moved.mp4")] == [(0.0, 1.0), (1.0, 2.0)]

    (folder / "moved.mp4").unlink()
    assert extract(folder, prune=True).deleted == 1
    assert [row.path for row in open_store(out) if row.kind == "video"] == ["copy.mov"] * 3


def test_two_of_the_same_bytes_are_decoded_once(extract, folder, fake_model):
    shutil.copyfile(folder / "clip.mp4", folder / "a.mov")
    summary = extract(folder, workers=3)
    assert (summary.encoded, summary.copied) == (5, 1)
    assert sum(map(len, fake_model.batches)) == 4 + 6


@pytest.mark.parametrize("clip_seconds", [None, 1.0])
def test_one_that_breaks_in_the_middle_fails_whole_and_is_tried_again_when_it_changes(
    extract, folder, out, clip_seconds
):
    put(folder / "torn.mp4", fake_video(8, breaks_at=5))
    summary = extract(folder, clip_seconds=clip_seconds)
    assert (summary.encoded, summary.failed) == (5, 1)
    (row,) = open_store(out).matching("torn.mp4")
    assert (row.status, row.error, row.kind, row.part, row.has_features) == ("failed", "ends early", "video", 0, False)
    assert extract(folder).failed_before == 1
    put(folder / "torn.mp4", fake_video(8))
    assert extract(folder).encoded == 1
    assert all(row.status == "ok" for row in open_store(out).matching("torn.mp4"))


def test_an_encoder_that_refuses_one_slice_fails_the_video_alone(extract, folder, fake_model, monkeypatch):
    from tests.support.fake_encoder import FakeEncoder

    real = FakeEncoder.encode

    def encode(self, batch):
        return [
            ItemError("not finite") if one.kind == "video" else done
            for one, done in zip(batch, real(self, batch), strict=True)
        ]

    monkeypatch.setattr(FakeEncoder, "encode", encode)
    summary = extract(folder, patch_budget=4)
    assert (summary.encoded, summary.failed) == (4, 1)


def test_without_videos_a_walk_leaves_them_out_and_a_named_one_says_why(extract, folder, out):
    assert extract(folder, videos=False).found == 4
    assert open_store(out).config.videos is None
    assert extract(folder, folder / "clip.mp4", videos=False).failed == 1
    assert "leaves videos out" in open_store(out)["clip.mp4"].error


def test_what_failed_as_videos_were_left_out_is_taken_up_when_they_are_not(extract, folder, out, monkeypatch):
    extract(folder, folder / "clip.mp4", videos=False)
    assert extract(folder).encoded == 1
    assert open_store(out)["clip.mp4"].status == "ok"


def test_a_store_without_videos_takes_any_way_of_looking_at_them(extract, folder, out):
    extract(folder, videos=False)
    assert extract(folder, clip_seconds=1.0).clips == 3
    assert open_store(out).config.videos["clip_seconds"] == 1.0


def test_a_store_with_videos_is_continued_as_it_was_made(extract, folder, out):
    extract(folder, clip_seconds=1.0)
    put(folder / "new.mp4", fake_video(4, fps=2.0))
    with pytest.raises(ConfigError, match="`clip_seconds` 2.0 instead of 1.0"):
        extract(folder, clip_seconds=2.0)
    with pytest.raises(ConfigError, match="`clip_seconds` 0 instead of 1.0"):
        extract(folder, clip_seconds=0)
    assert extract(folder).clips == 2


def test_other_versions_of_the_reader_leave_images_alone_and_say_what_to_do(extract, folder, out, monkeypatch):
    from tests.support.fake_encoder import FakeEncoder

    real = FakeEncoder.load_clips

    def with_version(version):
        def load_clips(self):
            from dataclasses import replace

            clips = real(self)
            return replace(clips, config=replace(clips.config, videos={**clips.config.videos, "av": version}))

        return load_clips

    monkeypatch.setattr(FakeEncoder, "load_clips", with_version("1.0"))
    extract(folder)
    monkeypatch.setattr(FakeEncoder, "load_clips", with_version("2.0"))
    put(folder / "new.mp4", fake_video(4))
    shutil.copyfile(folder / "coffee.png", folder / "same.png")
    put(folder / "photo.png", (folder / "chelsea.png").read_bytes() + b"more")
    summary = extract(folder)
    assert (summary.failed, summary.encoded, summary.copied) == (1, 1, 1)
    row = open_store(out)["new.mp4"]
    assert "were read by av 1.0" in row.error
    assert row.error_kind == "reader-missing"


def test_a_rebuild_may_look_at_videos_in_another_way(extract, folder, out):
    extract(folder, clip_seconds=1.0)
    assert extract(folder, rebuild=True, clip_seconds=1.5).clips == 2
    assert extract(folder, rebuild=True).clips == 2
    assert extract(folder, rebuild=True, clip_seconds=0).clips == 1
    assert open_store(out)["clip.mp4"].start is None


def test_features_of_many_parts_are_kept_in_a_file_until_the_last_is_there(extract, folder, out, monkeypatch):
    monkeypatch.setattr(parts_module, "IN_MEMORY_BYTES", 0)
    extract(folder, clip_seconds=1.0)
    store = open_store(out)
    assert [grey(store.features(row)) for row in store.matching("clip.mp4")] == [[0, 10], [20, 30], [40, 50]]
    assert not list((out / ".qvsplit" / "staging").iterdir())


def test_a_clip_of_more_tokens_than_the_limit_is_flagged(extract, folder, out, monkeypatch):
    from dataclasses import replace

    from tests.support.fake_encoder import FakeEncoder

    real = FakeEncoder.load_clips

    def load_clips(self):
        clips = real(self)
        return replace(clips, config=replace(clips.config, videos={**clips.config.videos, "max_tokens": 3}))

    monkeypatch.setattr(FakeEncoder, "load_clips", load_clips)
    put(folder / "short.mp4", fake_video(2))
    extract(folder)
    store = open_store(out)
    assert (store["short.mp4"].n_tokens, store["clip.mp4"].n_tokens) == (2, 6)
    assert store["short.mp4"].warnings is None
    assert "takes no smaller frames" in store["clip.mp4"].warnings
    assert json.loads(store["clip.mp4"].media)["flags"] == [store["clip.mp4"].warnings]


def test_a_file_that_changes_while_it_is_decoded_says_nothing_of_its_copies(extract, folder, out, monkeypatch):
    shutil.copy2(folder / "clip.mp4", folder / "b.mp4")
    real = InThreadDecoders.frames

    def frames(self, entry, info, indices):
        for number, frame in enumerate(real(self, entry, info, indices)):
            if entry.path == "b.mp4" and number == 3:
                raise ItemError(CHANGED)
            yield frame

    with monkeypatch.context() as changing:
        changing.setattr(InThreadDecoders, "frames", frames)
        summary = extract(folder)
    assert [path for path, _ in summary.failures] == ["b.mp4"]
    assert summary.encoded + summary.remaining == 5  # the copy may have waited for these bytes, or come behind them
    assert summary.encoded + extract(folder).encoded == 5
    assert open_store(out)["clip.mp4"].status == "ok"


def test_options_that_cannot_be(extract, folder):
    for wrong in (
        {"fps": 0},
        {"max_frames": 9000},
        {"num_frames": 0},
        {"clip_seconds": -1},
        {"gif": "both"},
        {"fps": 1.0, "num_frames": 3},
    ):
        with pytest.raises(UsageError):
            extract(folder, **wrong)


def test_a_run_with_a_limit_leaves_a_video_for_the_next(extract, folder, out):
    assert extract(folder, limit=4).remaining == 1
    assert extract(folder).encoded == 1
    assert len(open_store(out)) == 5


def test_decoding_that_is_given_up_ends_its_decoder(extract, folder, monkeypatch):
    """A video of the same bytes as one in flight is not decoded to its end."""
    closed, real = [], InThreadDecoders.frames

    def frames(self, entry, info, indices):
        try:
            yield from real(self, entry, info, indices)
        finally:
            closed.append(entry.path)

    monkeypatch.setattr(InThreadDecoders, "frames", frames)
    shutil.copyfile(folder / "clip.mp4", folder / "a.mov")
    extract(folder, workers=4)
    assert set(closed) <= {"clip.mp4", "a.mov"}
    assert closed
    assert np.all([name.endswith((".mp4", ".mov")) for name in closed])


def test_a_clip_that_no_row_holds_fails_before_a_frame_is_decoded(extract, folder, out, monkeypatch):
    """Its longest clip says so; slices, each of which would do, are not encoded first."""
    monkeypatch.setattr(stages, "size_error", lambda tokens, specs: "has too many tokens" if tokens > 3 else None)
    decoded, real = [], InThreadDecoders.frames
    monkeypatch.setattr(InThreadDecoders, "frames", lambda *args: (decoded.append(args), real(*args))[1])
    assert extract(folder / "clip.mp4", clip_seconds=2.0).failed == 1  # of four frames, and of two
    assert not decoded
    assert "too many tokens; try `clip_seconds`" in open_store(out)["clip.mp4"].error
    assert extract(folder / "clip.mp4", rebuild=True, clip_seconds=1.5).clips == 2


def test_a_slice_of_a_clip_goes_through_the_encoder_alone(extract, folder, fake_model):
    """Beside others its sums would be rounded in another way, and the features depend on neighbours."""
    put(folder / "another.mp4", fake_video(3))
    kinds = []
    fake_model.on_encode = lambda batch: kinds.append([one.kind for one in batch])
    assert extract(folder, patch_budget=10_000, workers=2).encoded == 6
    assert [one for one in kinds if "video" in one] == [["video"]] * 9


def test_a_file_for_features_of_many_parts_is_in_the_stores_own_folder(extract, folder, out, monkeypatch):
    """On the disk that the caller has chosen for them."""
    places, real = [], parts_module.TemporaryFile
    monkeypatch.setattr(parts_module, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(parts_module, "TemporaryFile", lambda dir: (places.append(dir), real(dir=dir))[1])
    extract(folder, clip_seconds=1.0)
    assert set(places) == {out / ".qvsplit" / "staging"}


def test_other_settings_of_the_video_processor_are_refused(extract, folder, out, monkeypatch):
    """That no option says: of another checkpoint with the same encoder."""
    real = FakeEncoder.load_clips

    def load_clips(self):
        clips = real(self)
        return replace(clips, config=replace(clips.config, videos={**clips.config.videos, "settings": {"mean": 1}}))

    extract(folder)
    put(folder / "new.mp4", fake_video(4))
    monkeypatch.setattr(FakeEncoder, "load_clips", load_clips)
    with pytest.raises(ConfigError, match="was made under another extraction config"):
        extract(folder)


def test_a_shard_with_videos_says_how_they_were_looked_at(extract, folder, out):
    """Rows that were known before the first video are in a shard of their own."""
    put(folder / "a.png", b"no image")
    extract(folder, clip_seconds=1.0)
    store = open_store(out)
    assert store["a.png"].status == "failed"
    assert store.features(store.matching("clip.mp4")[2]).config.videos["clip_seconds"] == 1.0
