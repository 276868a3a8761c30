"""Clips to what an encoder takes: limits, outline and slices, held against transformers' own processor on real pixels."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from transformers import AutoProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from qvsplit.checkpoints import hf
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.errors import ItemError, ModelError, UsageError
from qvsplit.models import clips as clips_module
from qvsplit.models.clips import ClipPreparer, load_clip_preparer, other_reader, set_limits
from qvsplit.models.preparing import PatchPreparer, load_preparer
from qvsplit.models.sampling import Clip, Sampling, VideoOptions
from qvsplit.sources.videos import VideoInfo
from tests.support.extracting import PHOTOS

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
LIMITS = {"max_pixels": 32 * 32 * 12, "max_tokens": 90}
SIZES = [(150, 100), (96, 64), (61, 143), (320, 200)]  # width and height; the second is a multiple of every patch


@pytest.fixture(scope="module")
def loaded(family_checkpoint):
    """Load the clip preparer of a family, with these limits and sampling."""

    def load(name: str, sampling: Sampling = Sampling(), **options) -> ClipPreparer:  # noqa: B008 - frozen
        checkpoint = open_checkpoint(family_checkpoint(name), "encoder")
        preparer = load_preparer(checkpoint, hf.load_config(checkpoint), min_pixels=None, max_pixels=None)
        return load_clip_preparer(checkpoint, preparer, VideoOptions(sampling, **options))

    return load


def filmed(count: int, width: int, height: int) -> np.ndarray:
    """Real pixels, uint8 [count, height, width, 3]: a photograph that is panned over."""
    with Image.open(PHOTOS["coffee.png"]) as photo:
        picture = np.array(photo.convert("RGB"))
    return np.stack([picture[3 * n : 3 * n + height, 5 * n : 5 * n + width] for n in range(count)])


def shared(frames: np.ndarray) -> Iterator[np.ndarray]:
    """Frames as a decoder gives them: each is valid only until the next is asked for."""
    buffer = np.empty_like(frames[0])
    for frame in frames:
        buffer[:] = frame
        yield buffer
    buffer[:] = 0


def clip_of(count: int, width: int, height: int, first: int = 0) -> tuple[Clip, VideoInfo]:
    """A clip of which every third frame is sampled, and its video of 7.5 frames a second."""
    info = VideoInfo(first + 3 * count, 7.5, (first + 3 * count) / 7.5, width, height, 0, "h264", "mov", 0, None)
    return Clip(0, None, None, 3 * count, 7.5, tuple(range(first, first + 3 * count, 3))), info


def theirs(preparer: ClipPreparer, folder, frames: np.ndarray, clip: Clip) -> dict:
    """What a caller of transformers gets for sampled frames, with the same limits in force."""
    processor, own = AutoProcessor.from_pretrained(folder), preparer.video_processor
    for name in ("size", "max_video_tokens", "cap_pixels_per_frame"):
        setattr(processor.video_processor, name, getattr(own, name))
    metadata = VideoMetadata(clip.n_frames, fps=clip.fps, frames_indices=list(clip.indices))
    return processor(
        text=["a " + processor.video_token + " z"], videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)],
        videos_kwargs={"video_metadata": [metadata], "do_sample_frames": False}, return_tensors="pt",
    )  # fmt: skip


def normalised(preparer: ClipPreparer, values: torch.Tensor) -> torch.Tensor:
    own = preparer.preparer
    return own.normalised(values, "video") if isinstance(own, PatchPreparer) else values


# ---------------------------------------------------------------------------------------- outline, slices, the whole


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FAMILIES)
def test_an_outline_is_what_the_processor_makes_of_the_pixels(name, size, loaded, family_checkpoint):
    preparer = loaded(name, **LIMITS)
    for count in (2, 5, 16):
        clip, info = clip_of(count, *size, first=30)
        outline = preparer.outline(clip, info)
        own = theirs(preparer, family_checkpoint(name), filmed(count, *size), clip)
        assert list(outline.grid_thw) == own["video_grid_thw"][0].tolist()
        assert outline.patches == len(own["pixel_values_videos"]) == 4 * outline.n_tokens
        assert outline.n_tokens <= LIMITS["max_tokens"]
        text = "".join(run * times for run, times in outline.placeholder)
        tokenizer = preparer.processor.tokenizer
        assert tokenizer("a " + text + " z")["input_ids"] == own["input_ids"][0].tolist()
        assert outline.kind == "video"
        assert all(value.device.type == "meta" for key, value in outline.values.items() if key.startswith("pixel"))
        if name == "qwen2_5_vl":
            (seconds,) = outline.inputs.pop("second_per_grid_ts")["values"]
            assert seconds == pytest.approx(float(own["second_per_grid_ts"][0]))
            assert seconds == pytest.approx(0.8)  # two frames of every third at 7.5 a second
        assert outline.inputs == {}


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_slices_are_the_whole_to_the_bit(name, count, loaded, family_checkpoint):
    """Of odd numbers of frames, of which the last is shown twice; and of frames that need no resizing."""
    preparer = loaded(name, **LIMITS)
    for size in SIZES[:3]:
        frames = filmed(count, *size)
        if count == 1:  # sampled twice
            frames = np.repeat(frames, 2, 0)
        clip, info = clip_of(len(frames), *size)
        own = theirs(preparer, family_checkpoint(name), frames, clip)
        t, h, w = (int(side) for side in own["video_grid_thw"][0])
        for budget in (1, h * w, 2 * h * w, 10**9):
            slices = list(preparer.prepare(clip, info, shared(frames), budget))
            steps = max(1, budget // (h * w))
            assert [one.grid_thw for one in slices] == [(min(steps, t - at), h, w) for at in range(0, t, steps)]
            assert [one.n_tokens for one in slices] == [one.grid_thw[0] * h * w // 4 for one in slices]
            assert [one.patches for one in slices] == [one.grid_thw[0] * h * w for one in slices]
            # a quarter of the memory; the encoder normalises
            assert {one.values["pixel_values_videos"].dtype for one in slices} == {torch.uint8}
            pixels = normalised(preparer, torch.cat([one.values["pixel_values_videos"] for one in slices]))
            assert torch.equal(pixels, own["pixel_values_videos"])
            outline = preparer.outline(clip, info)
            assert (slices[0].placeholder, slices[0].inputs) == (outline.placeholder, outline.inputs)
            assert all(one.placeholder == () and one.inputs == {} for one in slices[1:])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_clip_takes_its_own_frames_and_no_more(name, loaded):
    preparer, frames = loaded(name, **LIMITS), filmed(9, 96, 64)
    clip, info = clip_of(4, 96, 64)
    given = iter(frames)
    for one in (preparer, replace(preparer, in_slices=False)):
        given = iter(frames)
        list(one.prepare(clip, info, given, 1))
        assert len(list(given)) == 5


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_a_clip_that_goes_through_whole_is_the_same(name, loaded):
    """Its frames are of one buffer that the decoder writes over."""
    preparer, frames = loaded(name, **LIMITS), filmed(5, 150, 100)
    clip, info = clip_of(5, 150, 100)
    slices = list(preparer.prepare(clip, info, shared(frames), 1))
    (whole,) = replace(preparer, in_slices=False).prepare(clip, info, shared(frames), 1)
    assert torch.equal(
        whole.values["pixel_values_videos"], torch.cat([one.values["pixel_values_videos"] for one in slices])
    )
    assert (whole.placeholder, whole.inputs, whole.kind) == (slices[0].placeholder, slices[0].inputs, "video")
    assert whole.n_tokens == sum(one.n_tokens for one in slices)


def test_a_clip_that_goes_through_whole_has_a_limit(loaded, monkeypatch):
    preparer = replace(loaded("qwen2_5_vl", **LIMITS), in_slices=False)
    clip, info = clip_of(60, 3840, 2160)

    def frames():
        raise AssertionError("no frame is decoded for it")
        yield

    with pytest.raises(ItemError, match=r"takes 1,423 MiB as frames, .* up to 1,024 MiB; try a smaller `max_frames`"):
        list(preparer.prepare(clip, info, frames(), 1))
    clip, info = clip_of(4, 96, 64)
    for limit, fits in ((4 * 96 * 64 * 3, True), (4 * 96 * 64 * 3 - 1, False)):
        monkeypatch.setattr(clips_module, "MAX_WHOLE_BYTES", limit)
        if fits:
            assert len(list(preparer.prepare(clip, info, iter(filmed(4, 96, 64)), 1))) == 1
        else:
            with pytest.raises(ItemError, match="go through whole"):
                list(preparer.prepare(clip, info, iter(filmed(4, 96, 64)), 1))


def test_slices_that_would_differ_from_the_whole_are_not_made(loaded, monkeypatch):
    preparer = loaded("qwen3_vl", **LIMITS)
    whole, slices, still = preparer.trial()
    assert [one.grid_thw[0] for one in slices] == [1] * 4
    assert whole.grid_thw == still.grid_thw and whole.grid_thw[0] == 4
    assert whole.placeholder == still.placeholder == slices[0].placeholder
    steps = still.values["pixel_values_videos"].view(4, -1)
    assert torch.equal(steps, steps[:1].expand_as(steps))
    real = ClipPreparer._resized
    monkeypatch.setattr(ClipPreparer, "_resized", lambda self, frame, h, w: real(self, frame, h, w) ^ 1)
    assert preparer.trial()[1] == []


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("raised", "message", "kind"),
    [
        (ValueError("too\nslim"), "the model's processor refuses it: too slim", "content"),
        (torch.OutOfMemoryError("CUDA out of memory"), "does not fit into memory", "memory"),
        (MemoryError(), "does not fit into memory", "memory"),
    ],
)
def test_what_a_processor_raises_is_said_of_the_clip(loaded, monkeypatch, raised, message, kind):
    preparer = loaded("qwen2_5_vl", **LIMITS)

    def refuse(*args, **options):
        raise raised

    monkeypatch.setattr(hf, "process_video", refuse)
    for prepare in (
        lambda: preparer.outline(*clip_of(4, 96, 64)),
        lambda: list(preparer.prepare(*clip_of(4, 96, 64), iter(filmed(4, 96, 64)), 1)),
    ):
        with pytest.raises(ItemError, match=f"^{message}$") as caught:
            prepare()
        assert caught.value.kind == kind


def test_a_bug_is_no_items_error(loaded, monkeypatch):
    preparer = loaded("qwen2_5_vl", **LIMITS)
    monkeypatch.setattr(hf, "process_video", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        preparer.outline(*clip_of(4, 96, 64))


def test_a_frame_that_is_too_slim_is_refused_in_one_line(loaded):
    with pytest.raises(ItemError, match=r"^the model's processor refuses it: absolute aspect ratio [^\n]*$"):
        loaded("qwen2_5_vl").outline(*clip_of(4, 9000, 30))


def test_a_model_without_videos_is_refused(loaded):
    for name in ("llava", "gemma3"):
        with pytest.raises(ModelError, match="models take no videos"):
            loaded(name)


def test_it_can_be_sent_elsewhere(loaded):
    preparer = loaded("qwen3_vl", **LIMITS)
    clip, info = clip_of(4, 96, 64)
    copy = pickle.loads(pickle.dumps(preparer))
    assert copy.outline(clip, info).placeholder == preparer.outline(clip, info).placeholder
    assert copy.settings == preparer.settings


# ----------------------------------------------------------------------------------------------------------- limits


def frames_and_grid(processor, count: int, width: int, height: int) -> tuple[int, int]:
    """Pixels of a frame after resizing, and tokens of the clip, by the processor itself; without pixels."""
    with torch.device("meta"):
        frames = torch.empty((count, 3, height, width), dtype=torch.uint8)
    grid = processor(videos=[frames], do_sample_frames=False, return_tensors="pt")["video_grid_thw"]
    t, h, w = grid[0].tolist()
    return h * w * processor.patch_size**2, t * h * w // processor.merge_size**2


@pytest.mark.parametrize("make", [Qwen2VLVideoProcessor, Qwen3VLVideoProcessor])
def test_limits_of_frames_and_clips_are_in_force_and_given_back(make):
    own = make().patch_size * make().merge_size
    square = own**2
    for max_pixels, max_tokens in ((10 * square, 100_000), (600 * square, 500), (50 * square, 2000), (7 * square, 64)):
        processor = make(size={"shortest_edge": 4 * square, "longest_edge": 768 * square})
        assert set_limits(processor, "x", max_pixels, max_tokens) == (max_pixels, max_tokens)
        if make is Qwen2VLVideoProcessor:  # which keeps a tenth back
            assert max_tokens - 1 <= processor.max_video_tokens * 0.9 <= max_tokens
        for count, width, height in ((2, 1280, 720), (8, 1920, 1080), (40, 640, 480), (64, 200, 900)):
            pixels, tokens = frames_and_grid(processor, count, width, height)
            least = count // 2 * 5  # 1.05 of four tokens a frame: a model takes no smaller ones
            assert pixels <= max_pixels
            assert tokens <= max(max_tokens, least)
            # and one of them is made use of, but for what whole tokens a side leave
            assert pixels > 0.4 * max_pixels or tokens > 0.4 * max_tokens


def test_without_limits_they_are_the_checkpoints_own_up_to_ours():
    frames = Qwen2VLVideoProcessor()
    assert set_limits(frames, "x", None, None) == (768 * 28**2, 12_288)
    assert frames.cap_pixels_per_frame is True
    frames = Qwen2VLVideoProcessor(size={"shortest_edge": 784, "longest_edge": 5000 * 784}, max_video_tokens=1000)
    assert set_limits(frames, "x", None, None) == (768 * 784, 900)
    frames = Qwen2VLVideoProcessor(size={"shortest_edge": 784, "longest_edge": 50 * 784})
    assert set_limits(frames, "x", None, None) == (50 * 784, 12_288)
    clips = Qwen3VLVideoProcessor()
    assert set_limits(clips, "x", None, None) == (768 * 1024, 768 // 2)
    assert clips.cap_pixels_per_frame is True
    clips = Qwen3VLVideoProcessor(
        size={"shortest_edge": 4096, "longest_edge": 32 * 32 * 2 * 50_000}, max_video_tokens=4000
    )
    assert set_limits(clips, "x", None, None) == (768 * 1024, 12_288)
    clips = Qwen3VLVideoProcessor(size={"shortest_edge": 4096, "longest_edge": 1024 * 2 * 100}, max_video_tokens=9)
    assert set_limits(clips, "x", None, None) == (9 * 1024, 100)


@pytest.mark.parametrize("make", [Qwen2VLVideoProcessor, Qwen3VLVideoProcessor])
def test_limits_below_the_checkpoints_least_size_lower_that(make):
    """The processor takes no frame that is smaller than 1.05 times its least size."""
    square = (make.patch_size * make.merge_size) ** 2
    for tokens in (1, 20, 100):
        processor = make()
        assert processor.size["shortest_edge"] == 128 * square
        set_limits(processor, "x", tokens * square, None)
        for width, height in ((640, 480), (1280, 720), (1302, 802)):
            pixels, _ = frames_and_grid(processor, 8, width, height)
            assert 0.7 * tokens * square < pixels <= tokens * square
    if make is Qwen3VLVideoProcessor:  # whose least size is that of a clip
        processor = make()
        set_limits(processor, "x", None, 8)
        assert processor.size["shortest_edge"] == processor.size["longest_edge"] == 8 * 2 * square
    processor = make()
    set_limits(processor, "x", square, 4)
    assert frames_and_grid(processor, 8, 640, 480) == (square, 4)


@pytest.mark.parametrize("make", [Qwen2VLVideoProcessor, Qwen3VLVideoProcessor])
def test_limits_that_cannot_be_are_refused(make):
    processor = make()
    square = (processor.patch_size * processor.merge_size) ** 2
    with pytest.raises(UsageError, match=f"`video_max_pixels` must be at least {square}"):
        set_limits(processor, "x", square - 1, None)
    with pytest.raises(UsageError, match="`video_max_tokens` must be at least 1"):
        set_limits(processor, "x", None, 0)
    assert set_limits(processor, "x", square, 1) == (square, 1)


@pytest.mark.parametrize("limits", [(1000, None), (None, 1000)])
def test_a_processor_with_a_rule_of_its_own_has_no_limits_to_set(limits):
    processor = tf.LlavaOnevisionVideoProcessor()
    before = dict(vars(processor))
    assert set_limits(processor, "some", None, None) == (None, None)
    with pytest.raises(UsageError, match="the processor of some models resizes videos by a rule of its own"):
        set_limits(processor, "some", *limits)
    assert vars(processor) == before


def test_the_checkpoints_processor_of_images_is_left_alone(loaded, family_checkpoint):
    checkpoint = open_checkpoint(family_checkpoint("qwen3_vl"), "encoder")
    images = load_preparer(checkpoint, hf.load_config(checkpoint), min_pixels=None, max_pixels=20_000)
    before = dict(vars(images.processor.video_processor))
    clips = load_clip_preparer(checkpoint, images, VideoOptions(Sampling(fps=1.0), **LIMITS))
    assert vars(images.processor.video_processor) == before
    assert clips.processor is not images.processor
    assert clips.video_processor.fps == 1.0


# --------------------------------------------------------------------------------------------------------- settings


def test_settings_say_what_decides(loaded):
    plain = loaded("qwen3_vl", **LIMITS).settings
    assert {name: plain[name] for name in ("fps", "max_frames", "num_frames", "clip_seconds", "gif")} == {
        "fps": 2.0, "max_frames": 768, "num_frames": None, "clip_seconds": None, "gif": "image"
    }  # fmt: skip
    assert (plain["max_pixels"], plain["max_tokens"]) == (LIMITS["max_pixels"], LIMITS["max_tokens"])
    assert plain["processor"] == "Qwen3VLVideoProcessor"
    assert {"rule", "av", "ffmpeg", "architecture"} <= plain.keys()
    inner = plain["settings"]
    assert inner["size"]["longest_edge"] == LIMITS["max_tokens"] * 2 * 32 * 32
    assert inner["max_video_tokens"] == 12
    assert (inner["patch_size"], inner["merge_size"], inner["temporal_patch_size"]) == (16, 2, 2)
    assert inner["cap_pixels_per_frame"] is True
    # those in force stand beside: else two configs that look at videos alike would be told apart
    assert not {"fps", "num_frames", "max_frames", "do_sample_frames", "min_pixels", "max_pixels"} & inner.keys()
    for changed, sampling, options in (
        ({"fps"}, Sampling(fps=1.0), {}),
        ({"fps", "num_frames"}, Sampling(num_frames=8), {}),
        ({"max_frames"}, Sampling(max_frames=9), {}),
        ({"clip_seconds"}, Sampling(clip_seconds=3.0), {}),
        ({"gif"}, Sampling(), {"gif": "video"}),
        ({"max_pixels", "settings"}, Sampling(), {"max_pixels": 9 * 1024}),
        ({"max_tokens", "settings"}, Sampling(), {"max_tokens": 91}),
    ):
        other = loaded("qwen3_vl", sampling, **LIMITS | options).settings
        assert {name for name in plain if plain[name] != other[name]} == changed
        assert other.keys() == plain.keys()
    assert loaded("qwen3_vl", Sampling(num_frames=8), **LIMITS).settings["fps"] is None


def test_readers_that_differ_are_named_where_nothing_else_does():
    mine = {"rule": 1, "av": "18.1", "ffmpeg": "8.1", "architecture": "x86_64", "fps": 2.0, "settings": {"a": 1}}
    assert other_reader(mine, dict(mine)) is None
    assert other_reader(mine, mine | {"av": "17.0"}) == "av 17.0"
    assert other_reader(mine, mine | {"architecture": "aarch64", "ffmpeg": "7.1"}) == "ffmpeg 7.1, architecture aarch64"
    assert other_reader(mine, mine | {"rule": 2}) == "rule 2"
    assert other_reader(mine, mine | {"fps": 1.0}) is None
    assert other_reader(mine, mine | {"av": "17.0", "fps": 1.0}) is None
    assert other_reader(mine, mine | {"av": "17.0", "new": 1}) is None
    assert other_reader(mine, {name: mine[name] for name in mine if name != "settings"} | {"av": "17.0"}) is None


def test_what_a_processor_sets_for_every_call_moves_to_where_limits_are():
    """Else it would override them."""
    videos = Qwen3VLVideoProcessor()
    processor = SimpleNamespace(video_processor=videos, videos_kwargs={"fps": 7, "max_frames": 5, "unknown": 1})
    given = processor.videos_kwargs
    clips_module._keep_settings_in_one_place(processor)
    assert (videos.fps, videos.max_frames, processor.videos_kwargs) == (7, 5, {"unknown": 1})
    assert given == {"fps": 7, "max_frames": 5, "unknown": 1}  # it may be of the class
    for nothing in (
        SimpleNamespace(video_processor=videos),
        SimpleNamespace(video_processor=videos, videos_kwargs=None),
    ):
        clips_module._keep_settings_in_one_place(nothing)
        assert nothing.videos_kwargs == {}


def test_limits_are_in_force_whatever_a_processor_sets_for_every_call(loaded, monkeypatch):
    real = hf.load_processor

    def load(checkpoint):
        processor = real(checkpoint)
        processor.videos_kwargs = {"size": {"shortest_edge": 4096, "longest_edge": 32 * 32 * 2 * 4}, "max_frames": 3}
        return processor

    clip, info = clip_of(16, 320, 200)
    expected = loaded("qwen3_vl", **LIMITS).outline(clip, info).grid_thw
    monkeypatch.setattr(hf, "load_processor", load)
    assert loaded("qwen3_vl", **LIMITS).outline(clip, info).grid_thw == expected


def test_a_clip_without_a_grid_is_as_large_as_its_tokens(loaded, monkeypatch):
    preparer = replace(loaded("qwen3_vl", **LIMITS), in_slices=False)
    made = {"pixel_values_videos": torch.zeros(4, 3, 8, 8)}, "a" + preparer.processor.video_token * 7
    monkeypatch.setattr(hf, "process_video", lambda *args, **options: made)
    (whole,) = preparer.prepare(*clip_of(4, 96, 64), iter(filmed(4, 96, 64)), 1)
    assert (whole.grid_thw, whole.n_tokens, whole.patches) == (None, 7, 7)
    made = made[0], "nothing"
    with pytest.raises(ItemError, match="gives no tokens by the model's own processor"):
        list(preparer.prepare(*clip_of(4, 96, 64), iter(filmed(4, 96, 64)), 1))
    made = {**made[0], "video_grid_thw": torch.ones(2, 3)}, "a" + preparer.processor.video_token * 7
    with pytest.raises(ItemError, match="cut into chunks with a grid each"):
        list(preparer.prepare(*clip_of(4, 96, 64), iter(filmed(4, 96, 64)), 1))


@pytest.mark.parametrize(
    ("steps", "most", "sizes"), [(10, 4, [4, 4, 2]), (9, 8, [5, 4]), (5, 8, [5]), (3, 1, [1, 1, 1])]
)
def test_slices_are_about_alike_so_that_none_has_very_few_rows(steps, most, sizes, loaded):
    """A product of a few rows is rounded in another way: a rest of one small step would have other bits."""
    preparer = loaded("qwen3_vl")
    clip, info = clip_of(2 * steps, 96, 64)
    outline = preparer.outline(clip, info)
    t, h, w = outline.grid_thw
    assert t == steps
    slices = preparer.prepare(clip, info, shared(filmed(2 * steps, 96, 64)), most * h * w)
    assert [one.grid_thw for one in slices] == [(size, h, w) for size in sizes]


# ---------------------------------------------------------------------------------------------- the processor's call


def test_a_processors_call_leaves_the_metadata_as_they_are(loaded):
    """Qwen3-VL's lengthens the list of frames where it is odd."""
    preparer, frames = loaded("qwen3_vl", **LIMITS), torch.from_numpy(filmed(5, 96, 64)).permute(0, 3, 1, 2)
    metadata = VideoMetadata(15, fps=7.5, frames_indices=[0, 3, 6, 9, 12])
    processed, text = hf.process_video(preparer.processor, frames, metadata)
    assert metadata.frames_indices == [0, 3, 6, 9, 12]
    assert hf.process_video(preparer.processor, frames, metadata)[1] == text
    assert processed.keys() == {"pixel_values_videos", "video_grid_thw"}


@pytest.mark.parametrize("lost", ["video_processor", "video_token"])
def test_a_processor_without_videos_is_refused(loaded, lost):
    processor = loaded("qwen3_vl", **LIMITS).processor
    setattr(processor, lost, None)
    with pytest.raises(ModelError, match="Qwen3VLProcessor has no video processor or no video token"):
        hf.process_video(processor, torch.zeros(4, 3, 64, 64, dtype=torch.uint8), VideoMetadata(4, fps=2.0))


def test_the_token_of_videos_goes_before_that_of_images():
    assert hf.token_shown("<i><v>", "<v>", "<i>") == "<v>"
    assert hf.token_shown("<i><i>", "<v>", "<i>") == hf.token_shown("<i>", None, "<i>") == "<i>"
    assert hf.token_shown("text", "<v>", None) is None
