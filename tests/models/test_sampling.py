"""Sampled frames are those that transformers' own processors take, and what they cannot take is said."""

from __future__ import annotations

import numpy as np
import pytest
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from qvsplit.errors import ItemError
from qvsplit.models.sampling import (
    BEYOND_THE_END,
    FEWER_FRAMES,
    SHOWN_AGAIN,
    Sampling,
    clips_of,
    metadata_of,
    set_sampling,
)
from qvsplit.sources.videos import VideoInfo

PROCESSORS = [Qwen2VLVideoProcessor, Qwen3VLVideoProcessor]


def video(n: int, fps: float = 25.0) -> VideoInfo:
    return VideoInfo(n, fps, n / fps, 320, 240, 0, "h264", "mov", 0, None)


def clips(processor_class, n: int, rate: float = 25.0, **how):
    sampling = Sampling(**how)
    processor = processor_class()
    set_sampling(processor, sampling)
    return clips_of(video(n, rate), sampling, processor)


@pytest.mark.parametrize("processor_class", PROCESSORS)
@pytest.mark.parametrize("how", [{}, {"fps": 1.0}, {"fps": 5.0, "max_frames": 20}, {"num_frames": 8}])
def test_frames_are_those_of_the_models_own_rule(processor_class, how):
    """Through the whole processor, as a caller of transformers has it: `do_sample_frames` with the same numbers."""
    for n, fps in ((8, 25.0), (50, 25.0), (121, 29.97), (300, 24.0), (1000, 12.5), (40, 100.0)):
        (clip,) = clips(processor_class, n, fps, **how)
        own = processor_class(cap_pixels_per_frame=True, max_frames=how.get("max_frames", 768))
        given = {"num_frames": how["num_frames"], "fps": None} if "num_frames" in how else {"fps": how.get("fps", 2.0)}
        seen = own(
            videos=[np.zeros((n, 3, 28, 28), np.uint8)], video_metadata=[VideoMetadata(n, fps=fps)], do_sample_frames=True,
            return_metadata=True, return_tensors="pt", size={"shortest_edge": 28 * 28, "longest_edge": 32 * 32 * 1000}, **given,
        )  # fmt: skip
        assert list(clip.indices) == [int(index) for index in seen["video_metadata"][0].frames_indices]
        assert (clip.part, clip.start, clip.end, clip.n_frames, clip.flags) == (0, None, None, n, ())


@pytest.mark.parametrize("n", [382, 494, 718])
def test_an_index_beyond_the_end_is_left_out_and_flagged(n):
    """Qwen2-VL's rule counts in float32, and gives one index too many now and then: there the reference raises."""
    processor = Qwen2VLVideoProcessor()
    theirs = [int(index) for index in processor.sample_frames(VideoMetadata(n, fps=25.0), fps=2.0)]
    (clip,) = clips(Qwen2VLVideoProcessor, n)
    if theirs[-1] == n:
        assert (list(clip.indices), clip.flags) == (theirs[:-1], (BEYOND_THE_END,))
    else:
        assert (list(clip.indices), clip.flags) == (theirs, ())


def test_some_length_has_such_an_index():
    flagged = [n for n in range(4, 1000) if BEYOND_THE_END in clips(Qwen2VLVideoProcessor, n)[0].flags]
    assert flagged
    assert all(clips(Qwen2VLVideoProcessor, n)[0].indices[-1] < n for n in flagged)


@pytest.mark.parametrize("processor_class", PROCESSORS)
def test_a_video_of_one_frame_shows_it_as_often_as_a_step_has_frames(processor_class):
    (clip,) = clips(processor_class, 1)
    assert (clip.indices, clip.flags) == ((0, 0), (SHOWN_AGAIN,))
    own = processor_class(cap_pixels_per_frame=True)
    with pytest.raises((ZeroDivisionError, ValueError)):  # of the reference
        own(videos=[np.zeros((1, 3, 28, 28), np.uint8)], video_metadata=[VideoMetadata(1, fps=25.0)],
            do_sample_frames=True, fps=2.0, return_tensors="pt")  # fmt: skip


@pytest.mark.parametrize("processor_class", PROCESSORS)
def test_more_frames_than_there_are_are_as_many_as_there_are(processor_class):
    (clip,) = clips(processor_class, 11, num_frames=16)
    assert (len(clip.indices), clip.flags) == (10, (FEWER_FRAMES,))
    (clip,) = clips(processor_class, 16, num_frames=16)
    assert (clip.indices, clip.flags) == (tuple(range(16)), ())


def test_a_long_video_has_at_most_so_many_frames():
    for processor_class in PROCESSORS:
        (clip,) = clips(processor_class, 100_000)
        assert len(clip.indices) == 768


def test_clips_cover_the_video_without_gap_or_overlap():
    found = clips(Qwen3VLVideoProcessor, 251, clip_seconds=2.0)  # 10.04 s
    assert [clip.part for clip in found] == list(range(5))  # the last frame alone is no clip
    assert [clip.start for clip in found] == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert [clip.end for clip in found] == [2.0, 4.0, 6.0, 8.0, 10.04]
    assert sum(clip.n_frames for clip in found) == 251
    for clip in found:
        assert all(clip.start <= index / 25.0 < clip.end for index in clip.indices)
    assert found[1].indices[0] == 50


def test_a_clip_is_sampled_as_if_it_were_a_video_of_its_own():
    (whole,) = clips(Qwen2VLVideoProcessor, 75)
    found = clips(Qwen2VLVideoProcessor, 225, clip_seconds=3.0)
    for part, clip in enumerate(found):
        assert clip.indices == tuple(75 * part + index for index in whole.indices)


def test_times_are_those_of_the_video_and_the_rate_that_of_the_clip():
    clip = clips(Qwen2VLVideoProcessor, 225, clip_seconds=3.0)[1]
    metadata = metadata_of(clip, video(225))
    assert metadata.timestamps == [index / 25.0 for index in clip.indices]
    assert metadata.timestamps[0] == 3.0
    assert metadata.sampled_fps == len(clip.indices) / 3.0


def test_a_video_shorter_than_a_clip_is_one_part():
    (clip,) = clips(Qwen2VLVideoProcessor, 50, clip_seconds=10.0)
    assert (clip.part, clip.start, clip.end) == (0, 0.0, 2.0)


def test_clips_shorter_than_a_frame_are_refused():
    with pytest.raises(ItemError, match=r"clips of 0\.01 s hold none"):
        clips(Qwen2VLVideoProcessor, 50, clip_seconds=0.01)


def test_two_frames_that_are_left_over_are_a_clip_of_their_own():
    found = clips(Qwen2VLVideoProcessor, 252, clip_seconds=2.0)
    assert [clip.n_frames for clip in found] == [50] * 5 + [2]


def test_a_clip_has_no_frame_more_because_seconds_are_rounded():
    assert 3 * 0.1 * 30 > 9
    assert [clip.n_frames for clip in clips(Qwen2VLVideoProcessor, 30, 30.0, clip_seconds=0.1)] == [3] * 10


def test_what_is_asked_for_is_in_force_in_the_processor():
    processor = Qwen3VLVideoProcessor()
    set_sampling(processor, Sampling(num_frames=8, max_frames=20))
    assert (processor.num_frames, processor.fps, processor.max_frames) == (8, None, 20)
    set_sampling(processor, Sampling(fps=1.5))
    assert (processor.num_frames, processor.fps, processor.max_frames) == (None, 1.5, 768)
    assert processor.do_sample_frames


@pytest.mark.parametrize("processor_class", [*PROCESSORS, LlavaOnevisionVideoProcessor])
def test_no_clip_has_more_frames_than_may_be(processor_class):
    """Qwen2-VL's rule rounds a number of frames up, and LLaVA-OneVision's knows no bound."""
    for most in (7, 22, 23):
        (clip,) = clips(processor_class, 250, fps=5.0, max_frames=most)
        assert len(clip.indices) in ((most // 2 * 2,) if processor_class is Qwen2VLVideoProcessor else (most,))


def test_one_video_leaves_the_processor_as_it_is_for_the_next():
    sampling, processor = Sampling(max_frames=7), LlavaOnevisionVideoProcessor()
    set_sampling(processor, sampling)
    before = dict(vars(processor))
    assert len(clips_of(video(2500), sampling, processor)[0].indices) == 7
    assert vars(processor) == before
    assert len(clips_of(video(50), sampling, processor)[0].indices) == 4


def test_of_an_odd_number_of_frames_as_many_are_taken_as_fill_whole_steps():
    (clip,) = clips(Qwen2VLVideoProcessor, 15, num_frames=15)
    assert (len(clip.indices), clip.flags) == (14, (FEWER_FRAMES,))


def test_one_frame_is_enough_where_a_step_has_no_more():
    (clip,) = clips(LlavaOnevisionVideoProcessor, 1)
    assert (clip.indices, clip.flags) == ((0,), ())


def test_what_a_rule_raises_is_said_of_the_video():
    with pytest.raises(ItemError, match=r"^the model's processor takes no frames of it: [^\n]*exceeds"):
        clips(LlavaOnevisionVideoProcessor, 30, fps=100.0)


@pytest.mark.parametrize("given", [[], [50, 60], [-1]])
def test_a_rule_that_gives_no_frame_of_the_video_is_an_error(given):
    class Other(Qwen2VLVideoProcessor):
        def sample_frames(self, metadata, **options):
            return given

    with pytest.raises(ItemError, match="gives no frames by the model's own rule"):
        clips(Other, 50)


def test_a_clip_lasts_as_long_as_its_frames():
    whole, clip = video(225), clips(Qwen2VLVideoProcessor, 225, clip_seconds=3.0)[1]
    assert metadata_of(clip, whole).duration == clip.end - clip.start == 3.0
