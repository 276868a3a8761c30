"""Which frames of a video are looked at: by its model's own rule, at the rate and up to the number asked for.

A video may be cut into clips of so many seconds, each sampled by itself. Times are frame numbers over the video's rate,
as they are in the prompts of families that write them there. docs/format.md has this as a contract.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvsplit.errors import ItemError

if TYPE_CHECKING:
    from qvsplit.sources.videos import VideoInfo

FPS = 2.0
MAX_FRAMES = 768
# Where nobody says: a minute of video takes 75 MB of a 2B model's features in float32, and 12,288 tokens of a prompt
MAX_TOKENS = 12_288  # of one clip
MAX_FRAME_TOKENS = 768  # of one frame: what Qwen's own tools allow
# What a clip is flagged with: where the model's own rule gives what cannot be, and what is done instead
BEYOND_THE_END = "an index beyond the last frame was left out"
SHOWN_AGAIN = "its only frame is shown more than once"
FEWER_FRAMES = "it has fewer frames than were asked for"
# and where a model's least size of a frame goes before the limit of a clip
MORE_TOKENS = "it has more tokens than `video_max_tokens`: the model takes no smaller frames"
_LEAST_FRAMES = 2  # of a clip that is cut off a longer one


@dataclass(frozen=True)
class Sampling:
    """How frames are chosen.

        qvsplit.VideoOptions(qvsplit.Sampling(fps=1.0, clip_seconds=10))

    Attributes:
        fps: Frames a second.
        max_frames: At most so many of one clip.
        num_frames: So many of every clip, whatever its length, in place of `fps`.
        clip_seconds: Cut longer videos into clips of so many seconds; None leaves them whole.
    """

    fps: float = FPS
    max_frames: int = MAX_FRAMES
    num_frames: int | None = None
    clip_seconds: float | None = None


@dataclass(frozen=True)
class VideoOptions:
    """How videos become features.

        qvsplit.load_encoder("demo", videos=qvsplit.VideoOptions(max_tokens=2048))

    Attributes:
        sampling: Which frames are looked at.
        max_pixels: Most pixels of one frame after resizing; None is the checkpoint's own, but at most MAX_FRAME_TOKENS.
        max_tokens: Most tokens of one clip; None is the checkpoint's own, but at most MAX_TOKENS.
        gif: Whether a GIF is an `image`, its first frame, or a `video`.
    """

    sampling: Sampling = Sampling()
    max_pixels: int | None = None
    max_tokens: int | None = None
    gif: str = "image"


@dataclass(frozen=True)
class Clip:
    """One part of a video, and the frames of it that are looked at.

    Attributes:
        part: Its number in the video; 0 where the video is whole.
        start: Where it begins, in seconds; None where the video is whole.
        end: Where it ends.
        n_frames: Its frames, of which some are sampled.
        fps: Frames a second of the video.
        indices: The sampled frames' numbers in the video, counted from 0.
        flags: What was done otherwise than by the model's own rule, which would have failed.
    """

    part: int
    start: float | None
    end: float | None
    n_frames: int
    fps: float
    indices: tuple[int, ...]
    flags: tuple[str, ...] = ()


def clips_of(info: VideoInfo, sampling: Sampling, video_processor: Any) -> list[Clip]:
    """Give the clips of a video with their sampled frames.

    Args:
        info: What the video's packets say.
        sampling: How frames are chosen.
        video_processor: The model's own, with the numbers of `sampling` in force; see `set_sampling`.

    Raises:
        ItemError: The model's rule gives no frames for it.
    """
    clips = []
    whole = sampling.clip_seconds is None
    for part, (first, after) in enumerate(_bounds(info, sampling.clip_seconds)):
        local, flags = _sampled(video_processor, after - first, info.fps, sampling)
        start, end = (None, None) if whole else (first / info.fps, after / info.fps)
        indices = tuple(first + index for index in local)
        clips.append(Clip(part, start, end, after - first, info.fps, indices, flags))
    return clips


def set_sampling(video_processor: Any, sampling: Sampling) -> None:
    """Put the numbers of `sampling` in force: a video processor reads its own attributes where a call names none."""
    video_processor.do_sample_frames = True
    video_processor.num_frames = sampling.num_frames
    video_processor.fps = sampling.fps if sampling.num_frames is None else None
    if hasattr(video_processor, "max_frames"):
        video_processor.max_frames = sampling.max_frames


def metadata_of(clip: Clip, info: VideoInfo) -> Any:
    """Give transformers' metadata of a clip's sampled frames: their numbers, and so their times, are the video's."""
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(
        total_num_frames=clip.n_frames, fps=clip.fps, width=info.width, height=info.height,
        duration=clip.n_frames / clip.fps, video_backend="pyav", frames_indices=list(clip.indices),
    )  # fmt: skip


def _bounds(info: VideoInfo, seconds: float | None) -> Iterator[tuple[int, int]]:
    """Give the first frame of each clip, and the one behind its last."""
    if seconds is None:
        yield 0, info.n_frames
        return
    edges = [0]
    while (edge := math.ceil(len(edges) * seconds * info.fps - 1e-9)) < info.n_frames:
        if edge > edges[-1]:
            edges.append(edge)
        else:  # clips shorter than a frame
            raise ItemError(f"has {info.fps:g} frames a second: clips of {seconds:g} s hold none; try a longer time")
    if len(edges) > 1 and info.n_frames - edges[-1] < _LEAST_FRAMES:
        edges.pop()  # too little for a clip of its own
    yield from zip(edges, [*edges[1:], info.n_frames], strict=True)


def _sampled(video_processor: Any, n: int, fps: float, sampling: Sampling) -> tuple[list[int], tuple[str, ...]]:
    """Give the numbers of the frames that the model's own rule takes out of `n`, and flags."""
    at_once = int(getattr(video_processor, "temporal_patch_size", None) or 1)
    if n == 1:
        return [0] * at_once, (SHOWN_AGAIN,) * (at_once > 1)
    number, flags = sampling.num_frames, []
    if number is not None and math.ceil(number / at_once) * at_once > n:
        number = max(n // at_once * at_once, 1)
        flags = [FEWER_FRAMES] if number < (sampling.num_frames or 0) else []
    indices = _by_rule(video_processor, n, fps, number)
    if number is None and len(indices) > sampling.max_frames:  # a rule that knows no such bound
        indices = _by_rule(video_processor, n, fps, sampling.max_frames)
    sound = [index for index in indices if 0 <= index < n]
    if len(sound) < len(indices):
        flags.append(BEYOND_THE_END)
    if not sound:
        raise ItemError("gives no frames by the model's own rule; try another `fps`, or `num_frames`")
    return sound, tuple(flags)


def _by_rule(video_processor: Any, n: int, fps: float, number: int | None) -> Sequence[int]:
    """Call the model's own `sample_frames` as its processor does."""
    from transformers.video_utils import VideoMetadata

    not_sampling = {"input_data_format", "do_convert_rgb", "do_sample_frames", "device", "video_metadata"}
    names = video_processor.valid_kwargs.__annotations__.keys() - not_sampling
    if number is not None:  # in a copy: several threads sample at once, and some rules look there, too
        video_processor = copy.copy(video_processor)
        video_processor.fps, video_processor.num_frames = None, number
    options = {name: getattr(video_processor, name, None) for name in names}
    try:
        metadata = VideoMetadata(total_num_frames=n, fps=fps, duration=n / fps)
        return [int(index) for index in video_processor.sample_frames(metadata=metadata, **options)]
    except (ValueError, ZeroDivisionError, RuntimeError) as error:
        raise ItemError(f"the model's processor takes no frames of it: {' '.join(str(error).split())}") from None
