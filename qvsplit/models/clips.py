"""Sampled frames of a clip to what the encoder takes: the checkpoint's own video processor, on the CPU.

A clip goes through in temporal slices, one frame in hand at a time, where the processor gives the same pixels so; that
is tried once on a small clip, to the bit. Elsewhere it goes through whole, up to a limit. How large frames become, what
stands for the clip in a prompt and what the language model takes beside its features the processor says itself, for a
clip without pixels (on the "meta" device).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from qvsplit.checkpoints import hf
from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.checkpoints.model_class import class_of, encoders_alone, takes_videos
from qvsplit.errors import ItemError, ModelError, UsageError
from qvsplit.models.encoder_shape import check_processor
from qvsplit.models.preparing import PatchPreparer, Prepared, Preparer, normalising_later, runs_of, small_inputs_of
from qvsplit.models.sampling import (
    MAX_FRAME_TOKENS,
    MAX_TOKENS,
    Clip,
    VideoOptions,
    clips_of,
    metadata_of,
    set_sampling,
)
from qvsplit.runtime.devices import is_out_of_memory
from qvsplit.sources.videos import VIDEO_RULE, VideoInfo, reader_versions

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

MAX_WHOLE_BYTES = 1 << 30  # of the frames of a clip that cannot be cut into slices
# What a video processor's limits of size are about: each frame, or all of a clip's together
SIZE_OF = {"Qwen2VLVideoProcessor": "frame", "Qwen3VLVideoProcessor": "clip"}
_TRIAL_FRAMES, _TRIAL_SIZE = 8, (150, 220)  # height and width
_READER = ("rule", "av", "ffmpeg", "architecture")
# fields of a video processor's file that decide no pixel
_NOT_PIXELS = frozenset({"auto_map", "processor_class", "video_processor_type", "_valid_processor_keys"})


@dataclass(frozen=True)
class ClipPreparer:
    """The checkpoint's video processor, with limits and sampling in force. Picklable; made by `load_clip_preparer`.

    Attributes:
        preparer: What prepares images; its processor is of its own, with this video processor in it.
        tokens: What may stand in a prompt where one row of a clip's features goes: a token of videos, or of images.
        options: How videos become features.
        settings: All that decides a frame or a token, for the extraction config.
        encoders_alone: Names of inputs that the language model has no use for.
        in_slices: Whether a clip goes through in temporal slices.
    """

    preparer: Preparer
    tokens: tuple[str | None, ...]
    options: VideoOptions
    settings: Mapping[str, Any]
    encoders_alone: frozenset[str] = frozenset()
    in_slices: bool = True

    @property
    def processor(self) -> Any:
        """Transformers' AutoProcessor."""
        return self.preparer.processor

    @property
    def video_processor(self) -> Any:
        """Its video processor."""
        return self.processor.video_processor

    def clips(self, info: VideoInfo) -> list[Clip]:
        """Give the clips of a video with their sampled frames. Raises ItemError."""
        return clips_of(info, self.options.sampling, self.video_processor)

    def outline(self, clip: Clip, info: VideoInfo) -> Prepared:
        """Give what the processor makes of a clip, but for pixels, by its measures alone.

        Only of one that goes through in slices: some processors look at pixels.

        Raises:
            ItemError: It takes no such clip.
        """
        import torch

        with torch.device("meta"):
            frames = torch.empty((len(clip.indices), 3, info.height, info.width), dtype=torch.uint8)
        return self._whole(frames, clip, info)

    def prepare(
        self, clip: Clip, info: VideoInfo, frames: Iterator[npt.NDArray[np.uint8]], patch_budget: int
    ) -> Iterator[Prepared]:
        """Prepare a clip in temporal slices; the first has the placeholder and the inputs of the whole clip.

        Args:
            clip: Which.
            info: Of its video.
            frames: Its sampled frames, uint8 [height, width, 3]; each is looked at before the next is taken.
            patch_budget: About how many patches a slice may have.

        Raises:
            ItemError: The model takes no such clip, or memory does not suffice.
        """
        import torch

        own = islice(frames, len(clip.indices))
        if not self.in_slices:
            size = len(clip.indices) * info.width * info.height * 3
            if size > MAX_WHOLE_BYTES:
                raise ItemError(
                    f"takes {size >> 20:,} MiB as frames, and this model's videos go through whole: up to "
                    f"{MAX_WHOLE_BYTES >> 20:,} MiB; try a smaller `max_frames` or `clip_seconds`"
                )
            whole = torch.stack([torch.from_numpy(frame.copy()).permute(2, 0, 1) for frame in own])
            yield self._whole(whole, clip, info)
            return
        yield from self._slices(self.outline(clip, info), clip, info, own, patch_budget)

    def trial(self) -> tuple[Prepared, list[Prepared], Prepared]:
        """Prepare a small clip: whole, in slices of one temporal step, and whole once more, of frames that are alike.

        There are no slices where they would differ from the whole in a bit.

        Raises:
            ModelError: The processor takes no such clip.
        """
        import torch

        height, width = _TRIAL_SIZE
        generator = torch.Generator().manual_seed(0)
        frames = torch.randint(0, 256, (_TRIAL_FRAMES, height, width, 3), dtype=torch.uint8, generator=generator)
        info = VideoInfo(_TRIAL_FRAMES, 2.0, _TRIAL_FRAMES / 2, width, height, 0, "", "", 0, None)
        clip = Clip(0, None, None, _TRIAL_FRAMES, 2.0, tuple(range(_TRIAL_FRAMES)))
        try:
            whole = self._whole(frames.permute(0, 3, 1, 2), clip, info)
            still = self._whole(frames[:1].expand_as(frames).permute(0, 3, 1, 2), clip, info)
            if whole.grid_thw is None or "pixel_values_videos" not in whole.values:
                return whole, [], still
            outline = self.outline(clip, info)
            slices = [*self._slices(outline, clip, info, iter(frames.numpy()), whole.patches // whole.grid_thw[0])]
        except ItemError as error:
            raise ModelError(f"its processor takes no small clip: {error}") from None
        except (NotImplementedError, RuntimeError):  # one that cannot do without pixels: see `outline`
            return whole, [], still
        pixels = torch.cat([one.values["pixel_values_videos"] for one in slices])
        return whole, slices if torch.equal(pixels, whole.values["pixel_values_videos"]) else [], still

    def _slices(
        self, outline: Prepared, clip: Clip, info: VideoInfo, frames: Iterator[npt.NDArray[np.uint8]], budget: int
    ) -> Iterator[Prepared]:
        import torch

        assert outline.grid_thw is not None
        t, h, w = outline.grid_thw
        at_once = int(self.video_processor.temporal_patch_size)
        # alike, for matrix products of very few rows are computed, and rounded, in another way
        number = math.ceil(t / math.ceil(t / max(1, budget // (h * w)))) * at_once  # frames in one slice
        metadata = metadata_of(clip, info)
        placeholder, inputs = outline.placeholder, outline.inputs
        while resized := [self._resized(frame, h, w) for frame in islice(frames, number)]:
            some = copy.deepcopy(metadata)
            some.frames_indices, metadata.frames_indices = (
                metadata.frames_indices[:number], metadata.frames_indices[number:]
            )  # fmt: skip
            processed = self._by_processor(torch.stack(resized), some, do_resize=False)[0]
            steps = int(processed["video_grid_thw"][0, 0])
            yield Prepared(
                _wanted(processed), steps * outline.n_tokens // t, steps * h * w, placeholder, (steps, h, w), inputs,
                "video",
            )  # fmt: skip
            placeholder, inputs = (), {}

    def _resized(self, frame: npt.NDArray[np.uint8], h: int, w: int) -> torch.Tensor:
        """Resize one frame [height, width, 3] to h × w patches as the processor does; gives [3, height, width]."""
        import torch
        from transformers.image_processing_backends import TorchvisionBackend
        from transformers.image_utils import SizeDict

        own = self.video_processor
        pixels = torch.from_numpy(frame).permute(2, 0, 1)
        if not own.do_resize:
            return pixels.clone()
        size = SizeDict(height=h * own.patch_size, width=w * own.patch_size)
        resized: torch.Tensor = TorchvisionBackend.resize(own, image=pixels, size=size, resample=own.resample)
        return resized.clone() if resized.data_ptr() == pixels.data_ptr() else resized

    def _whole(self, frames: torch.Tensor, clip: Clip, info: VideoInfo) -> Prepared:
        """Have the processor prepare all frames [frames, 3, height, width] at once."""
        processed, text = self._by_processor(frames, metadata_of(clip, info))
        grid = processed.get("video_grid_thw")
        if grid is not None and len(grid) > 1:
            raise ItemError("is cut into chunks with a grid each by the model's own processor; a row holds one grid")
        t, h, w = (int(n) for n in grid[0]) if grid is not None else (0, 0, 0)
        token = hf.token_shown(text, *self.tokens)
        if token is None:
            raise ItemError("gives no tokens by the model's own processor")
        n_tokens = text.count(token)
        inputs = small_inputs_of(processed, self.preparer.language_model_takes, self.encoders_alone)
        return Prepared(
            _wanted(processed), n_tokens, t * h * w or n_tokens, runs_of(text, token),
            (t, h, w) if grid is not None else None, inputs, "video",
        )  # fmt: skip

    @property
    def _later(self) -> dict[str, bool]:
        """What the encoder does on its device, where it takes patches as bytes."""
        return normalising_later(self.video_processor) if isinstance(self.preparer, PatchPreparer) else {}

    def _by_processor(self, frames: torch.Tensor, metadata: Any, **later: Any) -> tuple[Mapping[str, Any], str]:
        try:
            return hf.process_video(self.processor, frames, metadata, later=self._later | later)
        except Exception as error:
            if is_out_of_memory(error):
                raise ItemError("does not fit into memory", "memory") from None
            if isinstance(error, ValueError):
                raise ItemError(f"the model's processor refuses it: {' '.join(str(error).split())}") from None
            raise


def _wanted(processed: Mapping[str, Any]) -> dict[str, Any]:
    """Give the tensors among what a processor made."""
    import torch

    return {name: value for name, value in processed.items() if isinstance(value, torch.Tensor)}


# ---------------------------------------------------------------------------------------------------------- loading


def load_clip_preparer(checkpoint: Checkpoint, preparer: Preparer, options: VideoOptions) -> ClipPreparer:
    """Load the checkpoint's video processor, with limits and sampling in force.

    Args:
        checkpoint: Whose.
        preparer: What prepares its images.
        options: How videos become features.

    Raises:
        ModelError: The model takes no videos.
        UsageError: Limits that its processor does not have, or that cannot be.
    """
    family = checkpoint.family.model_type
    processor = hf.load_processor(checkpoint)
    config = hf.load_config(checkpoint)
    video_processor = getattr(processor, "video_processor", None)
    full = class_of(checkpoint)
    if video_processor is None or not takes_videos(full):
        raise ModelError(f"{family} models take no videos")
    if isinstance(preparer, PatchPreparer):
        check_processor(video_processor, config.vision_config.to_dict(), checkpoint.folder)
    _keep_settings_in_one_place(processor)
    max_pixels, max_tokens = set_limits(video_processor, family, options.max_pixels, options.max_tokens)
    set_sampling(video_processor, options.sampling)
    settings = {
        "rule": VIDEO_RULE,
        **reader_versions(),
        "processor": type(video_processor).__name__,
        "settings": _settings(video_processor, checkpoint),
        "fps": options.sampling.fps if options.sampling.num_frames is None else None,
        "max_frames": options.sampling.max_frames,
        "num_frames": options.sampling.num_frames,
        "clip_seconds": options.sampling.clip_seconds,
        "max_pixels": max_pixels,
        "max_tokens": max_tokens,
        "gif": options.gif,
    }
    tokens = hf.video_token(config, processor), preparer.image_token
    alone = encoders_alone(full) | {"video_grid_thw"}
    return ClipPreparer(replace(preparer, processor=processor), tokens, options, settings, alone)


def _keep_settings_in_one_place(processor: Any) -> None:
    """Move what a processor sets for every call of its video processor into that one, where limits are put in force."""
    own = dict(getattr(processor, "videos_kwargs", None) or {})
    for name in [name for name in own if hasattr(processor.video_processor, name)]:
        setattr(processor.video_processor, name, own.pop(name))
    processor.videos_kwargs = own


def other_reader(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Say in which libraries two settings of videos differ, where they differ in nothing else; else give None."""
    if any(mine.get(name) != theirs.get(name) for name in mine.keys() | theirs.keys() if name not in _READER):
        return None
    differ = [name for name in _READER if mine.get(name) != theirs.get(name)]
    return ", ".join(f"{name} {theirs.get(name)}" for name in differ) or None


def set_limits(
    video_processor: Any, family: str, max_pixels: int | None, max_tokens: int | None
) -> tuple[int | None, int | None]:
    """Put limits of size in force, of a frame and of a clip, by the processor's own rule for either; gives them.

    None for a processor that has no such limits.

    Raises:
        UsageError: The processor has no such limits, or they cannot be.
    """
    about = SIZE_OF.get(type(video_processor).__name__)
    if about is None:
        if max_pixels is not None or max_tokens is not None:
            raise UsageError(
                f"the processor of {family} models resizes videos by a rule of its own: leave `video_max_pixels` and "
                "`video_max_tokens` out"
            )
        return None, None
    square = (int(video_processor.patch_size) * int(video_processor.merge_size)) ** 2  # pixels of a token
    steps = int(video_processor.temporal_patch_size)
    size = video_processor.size
    low, high = int(size["shortest_edge"]), int(size["longest_edge"])
    for name, value, least in (("video_max_pixels", max_pixels, square), ("video_max_tokens", max_tokens, 1)):
        if value is not None and value < least:
            raise UsageError(f"`{name}` must be at least {least}")
    if about == "frame":
        high = frame = min(high, MAX_FRAME_TOKENS * square) if max_pixels is None else max_pixels
        own = int(video_processor.max_video_tokens * 0.9)  # the processor's own margin
        tokens = min(own, MAX_TOKENS) if max_tokens is None else max_tokens
        video_processor.max_video_tokens = int(tokens / 0.9)
    else:
        own = high // (square * steps)
        tokens = min(own, MAX_TOKENS) if max_tokens is None else max_tokens
        high = tokens * square * steps
        own = min(int(video_processor.max_video_tokens), MAX_FRAME_TOKENS)
        video_processor.max_video_tokens = own if max_pixels is None else max_pixels // square
        frame = video_processor.max_video_tokens * square
    if max_pixels is not None:  # the processor lets no frame be smaller than 1.05 times its least size
        low = min(low, int(max_pixels / 1.05))
    video_processor.size = {"shortest_edge": min(low, high), "longest_edge": high}
    video_processor.cap_pixels_per_frame = True
    return frame, tokens


def _settings(video_processor: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """Give what the checkpoint's file says of its video processor, and the limits in force."""
    settings = {name: value for name, value in checkpoint.video_processor_config.items() if name not in _NOT_PIXELS}
    for name in ("patch_size", "merge_size", "temporal_patch_size", "max_video_tokens", "cap_pixels_per_frame"):
        if (value := getattr(video_processor, name, None)) is not None:
            settings[name] = value
    if type(video_processor).__name__ in SIZE_OF:
        size = video_processor.size
        settings["size"] = {name: int(size[name]) for name in ("shortest_edge", "longest_edge")}
    for name in ("fps", "num_frames", "max_frames", "do_sample_frames", "min_pixels", "max_pixels"):
        settings.pop(name, None)  # those in force stand beside
    return settings
