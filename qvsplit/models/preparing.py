"""Upright RGB images to what the encoder takes: the checkpoint's own processor, on the CPU.

`Preparer` is picklable: it holds the processor and a few numbers, no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

from qvsplit.checkpoints import hf
from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.checkpoints.families import Family, settings_of
from qvsplit.errors import ItemError, ModelError, UsageError
from qvsplit.runtime.devices import is_out_of_memory
from qvsplit.store.row import Runs

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch


@dataclass(frozen=True)
class Prepared:
    """One image, ready for the encoder. Both temporal slices of a still image are alike: one is kept.

    Attributes:
        pixels: [t·h·w, channels·patch²], uint8, not yet normalised; float32 where the processor does not normalise.
        grid_thw: Patches in time, height and width.
        n_tokens: Tokens that the encoder makes of it.
        placeholder: The text that stands for it in a prompt, as runs of (text, count).
        inputs: Other small inputs of the language model.
    """

    pixels: torch.Tensor
    grid_thw: tuple[int, int, int]
    n_tokens: int
    placeholder: Runs
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def patches(self) -> int:
        """Patches: t·h·w."""
        t, h, w = self.grid_thw
        return t * h * w


class ImagePreparer(Protocol):
    """What prepares an image for an encoder, on the CPU. Picklable."""

    def prepare(self, image: npt.NDArray[np.uint8]) -> Prepared:
        """Prepare an image [height, width, 3]. Raises ItemError."""


@dataclass(frozen=True)
class Preparer:
    """The checkpoint's processor with the pixel limits in force, and how its output is laid out."""

    processor: Any  # transformers' AutoProcessor
    family: Family
    in_channels: int
    temporal_patch_size: int

    def prepare(self, image: npt.NDArray[np.uint8]) -> Prepared:
        """Resize an image [height, width, 3] and cut it into patches.

        Raises:
            ItemError: The model takes no such shape, or memory does not suffice.
        """
        check_shape(image.shape[1], image.shape[0], self.family)
        later = {"do_rescale": False, "do_normalize": False} if self.normalises else {}
        try:
            features = self.processor.image_processor(
                images=[image], input_data_format="channels_last", return_tensors="pt", **later
            )
        except Exception as error:
            if is_out_of_memory(error):
                raise ItemError("does not fit into memory", "memory") from None
            raise
        t, h, w = (int(n) for n in features["image_grid_thw"][0])
        values = features["pixel_values"]  # [patches, channels·temporal·patch²]
        slices = values.view(len(values), self.in_channels, self.temporal_patch_size, -1)
        placeholder = str(self.processor.replace_image_token(features, 0))
        n_tokens = t * h * w // int(self.processor.image_processor.merge_size) ** 2
        return Prepared(slices[:, :, 0].reshape(len(values), -1), (t, h, w), n_tokens, self._runs(placeholder))

    def _runs(self, placeholder: str) -> Runs:
        """Shorten a placeholder to runs: 1,280 image tokens are one."""
        token = self.family.image_token
        parts = placeholder.replace(token, f"\0{token}\0").split("\0")
        return tuple((text, len(list(run))) for text, run in groupby(part for part in parts if part))

    @property
    def normalises(self) -> bool:
        """Whether the processor rescales and normalises, which is then done later, on the encoder's device."""
        image_processor = self.processor.image_processor
        return bool(image_processor.do_rescale and image_processor.do_normalize)

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """Give float32 values of one temporal slice: the AutoProcessor's own to the bit, which folds the factor in."""
        import torch

        if pixels.dtype != torch.uint8:
            return pixels
        image_processor = self.processor.image_processor
        mean, deviation = (
            (torch.tensor(value) * (1.0 / image_processor.rescale_factor))
            .view(1, self.in_channels, 1)
            .to(pixels.device)
            for value in (image_processor.image_mean, image_processor.image_std)
        )
        return pixels.view(len(pixels), self.in_channels, -1).float().sub_(mean).div_(deviation).flatten(1)


def load_preparer(checkpoint: Checkpoint, *, min_pixels: int | None, max_pixels: int | None) -> Preparer:
    """Load the checkpoint's AutoProcessor, with the torchvision backend and the pixel limits in force."""
    processor = hf.load_processor(checkpoint)
    vision = settings_of(checkpoint.vision_config, checkpoint.family.vision_settings)
    with hf.transformers_errors(checkpoint):
        low, high = pixel_limits(processor.image_processor, checkpoint.family, min_pixels, max_pixels)
    processor.image_processor.size = {"shortest_edge": low, "longest_edge": high}
    merge = vision["spatial_merge_size"]
    if processor.image_processor.merge_size != merge:
        raise ModelError(
            f"{checkpoint.folder}: its processor merges {processor.image_processor.merge_size} patches a side, its "
            f"encoder {merge}; download it again"
        )
    return Preparer(processor, checkpoint.family, int(vision["in_channels"]), int(vision["temporal_patch_size"]))


def pixel_limits(image_processor: Any, family: Family, low: int | None, high: int | None) -> tuple[int, int]:
    """Give the fewest and the most pixels after resizing.

    They are the checkpoint's own, but at most `Family.default_max_pixels` unless more are asked for.

    Raises:
        UsageError: They cross.
    """
    own = image_processor.size
    low = int(own["shortest_edge"]) if low is None else low
    if high is None:
        high = min(int(own["longest_edge"]), family.default_max_pixels)
    side = int(image_processor.patch_size) * int(image_processor.merge_size)
    if low < 1 or high < side * side:
        raise UsageError(f"`max_pixels` must be at least {side * side} (one token), `min_pixels` at least 1")
    if low > high:
        raise UsageError(f"`min_pixels` {low} is more than `max_pixels` {high}")
    return low, high


def pixel_settings(image_processor: Any, family: Family) -> dict[str, Any]:
    """Give the processor's settings that decide pixels, with the limits in force and the backend that resamples."""
    settings = settings_of(image_processor.to_dict(), family.processor_settings)
    settings["min_pixels"] = int(image_processor.size["shortest_edge"])
    settings["max_pixels"] = int(image_processor.size["longest_edge"])
    settings["backend"] = "torchvision"
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def check_shape(width: int, height: int, family: Family) -> None:
    """ItemError for an image slimmer than the processor takes."""
    long, short = max(width, height), min(width, height)
    if long > family.max_aspect_ratio * short:
        raise ItemError(
            f"is {width}×{height}, slimmer than 1:{family.max_aspect_ratio:g}, which the model's processor refuses"
        )
