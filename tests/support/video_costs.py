"""What a minute of video costs in tokens and bytes, by each family's real processor and limits: rows of docs/models.md.

Nothing is decoded or encoded: the processor says of a clip's measures alone how many tokens it makes. Its settings are
those of the hub's checkpoints where they are known here, else what its class has where a file names nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from qvsplit.checkpoints import hf
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.models.clips import ClipPreparer, load_clip_preparer
from qvsplit.models.preparing import load_preparer
from qvsplit.models.sampling import VideoOptions
from qvsplit.sources.videos import VideoInfo
from tests.support.families import make_checkpoint
from tests.support.families.reference import Made

MINUTE = VideoInfo(1500, 25.0, 60.0, 1280, 720, 0, "h264", "mov", 0, None)
DTYPES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Size:
    """A size of a family: its name, the width of its language model, and how many tensors of it a token takes."""

    name: str
    width: int
    tensors: int = 1

    def megabytes(self, tokens: int) -> str:
        """Say what so many tokens take, before compression, in each dtype."""
        values = tokens * self.tensors * self.width
        return f"{self.name}: " + " · ".join(f"{values * size / 1e6:.0f}" for size in DTYPES.values())


@dataclass(frozen=True)
class Known:
    """What is known of a family's checkpoints on the hub.

    Attributes:
        video: The fields of the video processor.
        processor: Those of the processor around it.
        sizes: Of the language model.
        is_hubs: Whether the fields are all that decides a token, so that none is the class's.
    """

    video: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] = field(default_factory=dict)
    sizes: tuple[Size, ...] = ()
    is_hubs: bool = True


def _edges(shortest: int, longest: int, patch: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": shortest, "longest_edge": longest}, "patch_size": patch}


_QWEN_2 = _edges(3136, 12_845_056, 14)
_QWEN_3 = _edges(4096, 25_165_824, 16)
KNOWN: Mapping[str, Known] = {
    "qwen2_vl": Known(_QWEN_2, sizes=(Size("2B", 1536), Size("7B", 3584))),
    "qwen2_5_vl": Known(_QWEN_2, sizes=(Size("3B", 2048), Size("7B", 3584))),
    "qwen3_vl": Known(_QWEN_3, sizes=(Size("2B", 2048, 4), Size("8B", 4096, 4))),
    "qwen3_vl_moe": Known(_QWEN_3, sizes=(Size("30B-A3B", 2048, 4),)),
    "qwen3_5": Known(_QWEN_3, sizes=(Size("9B", 4096),)),
    "qwen3_5_moe": Known(_QWEN_3),
    # the class of an Omni's processor names sizes of videos itself, for its patches
    "qwen2_5_omni": Known({"patch_size": 14}, sizes=(Size("7B", 3584),), is_hubs=False),
    "qwen3_omni_moe": Known({"patch_size": 16}, sizes=(Size("30B-A3B", 2048, 4),), is_hubs=False),
    "glm4v": Known(sizes=(Size("9B", 4096),), is_hubs=False),
    "llava_onevision": Known({"size": {"height": 384, "width": 384}}, {"num_image_tokens": 729}, (Size("7B", 3584),)),
    "ernie4_5_vl_moe": Known({"draw_on_frames": False}, sizes=(Size("28B-A3B", 2560),), is_hubs=False),
    "molmo2": Known(sizes=(Size("8B", 4096),), is_hubs=False),
}
_NOTHING = Known(is_hubs=False)


@dataclass(frozen=True)
class MinuteRow:
    """What a minute of a family's video costs, at the default settings."""

    family: str
    settings: str
    frames: int
    tokens: int
    sizes: tuple[Size, ...]

    def __str__(self) -> str:
        """Give the row of the table."""
        bytes_of_sizes = "; ".join(size.megabytes(self.tokens) for size in self.sizes) or "–"
        return f"| {self.family} | {self.settings} | {self.frames} | {self.tokens:,} | {bytes_of_sizes} |"


def minute_row(name: str, folder: Path, made: Made | None = None) -> MinuteRow:
    """Ask the processor of a family, put into a copy of its tiny checkpoint in the new `folder`."""
    known = KNOWN.get(name, _NOTHING)
    if made is None:
        make_checkpoint(name, folder / "model")
    else:
        shutil.copytree(made[0], folder / "model")
    preparer = _preparer(known, folder / "model")
    (clip,) = preparer.clips(MINUTE)
    outline = preparer.outline(clip, MINUTE)
    settings = "the hub's" if known.is_hubs else "its class's"
    return MinuteRow(name, settings, len(clip.indices), outline.n_tokens, known.sizes)


def _preparer(known: Known, folder: Path) -> ClipPreparer:
    processor = AutoProcessor.from_pretrained(folder)
    processor.video_processor = type(processor.video_processor)(**known.video)
    for field_name, value in known.processor.items():
        assert hasattr(processor, field_name), field_name
        setattr(processor, field_name, value)
    processor.save_pretrained(folder)
    checkpoint = open_checkpoint(folder, "encoder")
    images = load_preparer(checkpoint, hf.load_config(checkpoint), min_pixels=None, max_pixels=None)
    return load_clip_preparer(checkpoint, images, VideoOptions())
