"""Upright RGB images to what the encoder takes: the checkpoint's own processor, on the CPU.

A preparer is picklable: it holds the processor and a few numbers, no weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

from qvsplit.checkpoints import hf
from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.checkpoints.families import Family
from qvsplit.checkpoints.model_class import class_of, forward_takes
from qvsplit.errors import ItemError, UsageError
from qvsplit.models.encoder_shape import EncoderShape, check_processor, shape_of
from qvsplit.runtime.devices import is_out_of_memory
from qvsplit.store.row import MAX_JSON_BYTES, Runs

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch


@dataclass(frozen=True)
class Prepared:
    """One image, or one temporal slice of a clip, ready for the encoder.

    Attributes:
        values: What the processor made of it, by name.
        n_tokens: Tokens that the encoder makes of it.
        patches: How large it is, to bound what is computed at once: t·h·w, where there is such a grid.
        placeholder: The text that stands for the item in a prompt, as runs of (text, count): for the image, or for the
            whole clip, in its first slice; empty in the others.
        grid_thw: Patches in time, height and width, where the family has such a grid.
        inputs: Other small inputs of the language model: name → dtype, shape, values; likewise of the item.
        kind: `image` or `video`.
    """

    values: Mapping[str, Any]
    n_tokens: int
    patches: int
    placeholder: Runs
    grid_thw: tuple[int, int, int] | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "image"

    @property
    def decoded_bytes(self) -> int:
        """Bytes of decoded pixels that it holds: of an image that is prepared on the encoder's device."""
        image: torch.Tensor | None = self.values.get("decoded")
        return 0 if image is None else image.nbytes


class ImagePreparer(Protocol):
    """What prepares an image for an encoder, on the CPU. Picklable."""

    def prepare(self, image: npt.NDArray[np.uint8]) -> Prepared:
        """Prepare an image [height, width, 3]. Raises ItemError."""


@dataclass(frozen=True)
class Preparer:
    """The checkpoint's processor, with the pixel limits in force.

    Attributes:
        processor: transformers' AutoProcessor.
        family: What the checkpoint is.
        image_token: What stands in a prompt where one row of features goes.
        language_model_takes: The names of what the full model's forward takes.
    """

    processor: Any
    family: Family
    image_token: str
    language_model_takes: frozenset[str]

    def prepare(self, image: npt.NDArray[np.uint8]) -> Prepared:
        """Prepare an image [height, width, 3]: what the processor gives for it where it is alone in a prompt.

        Raises:
            ItemError: The model takes no such shape, or memory does not suffice.
        """
        processed, text = self._processed(image)
        grid = processed.get("image_grid_thw")
        t, h, w = (int(n) for n in grid[0]) if grid is not None else (0, 0, 0)
        n_tokens = text.count(self.image_token)
        return Prepared(
            dict(processed),
            n_tokens, t * h * w or n_tokens, runs_of(text, self.image_token), (t, h, w) if grid is not None else None,
            small_inputs_of(processed, self.language_model_takes, {"image_grid_thw"}),
        )  # fmt: skip

    def _processed(self, image: npt.NDArray[np.uint8] | torch.Tensor, **later: bool) -> tuple[Mapping[str, Any], str]:
        check_shape(image.shape[1], image.shape[0], self.family)
        try:
            return hf.process_image(self.processor, image, later={"input_data_format": "channels_last", **later})
        except Exception as error:
            if is_out_of_memory(error):
                raise ItemError("does not fit into memory", "memory") from None
            if isinstance(error, ValueError):  # of a family that is not listed, nobody knows which shapes it takes
                raise ItemError(f"the model's processor refuses it: {' '.join(str(error).split())}") from None
            raise


@dataclass(frozen=True)
class PatchPreparer(Preparer):
    """A preparer of patches that are normalised later, on the encoder's device.

    `values` has `pixels`: [t·h·w, channels·patch²], uint8; float32 where the processor does not normalise. Both
    temporal slices of a still image are alike: one is kept.
    """

    shape: EncoderShape

    def prepare(self, image: npt.NDArray[np.uint8]) -> Prepared:
        """Resize an image [height, width, 3] and cut it into patches. Raises as `Preparer.prepare`."""
        processed, text = self._processed(image, **normalising_later(self.processor.image_processor))
        t, h, w = (int(n) for n in processed["image_grid_thw"][0])
        pixels = self.first_slices(processed["pixel_values"])
        return Prepared(
            {"pixels": pixels}, text.count(self.image_token), t * h * w, runs_of(text, self.image_token), (t, h, w)
        )

    def first_slices(self, values: torch.Tensor) -> torch.Tensor:
        """Give one temporal slice of [patches, channels·temporal·patch²]: [patches, channels·patch²]."""
        slices = values.view(len(values), self.shape.channels, self.shape.temporal, -1)
        return slices[:, :, 0].reshape(len(values), -1)

    def normalised(self, pixels: torch.Tensor, kind: str = "image") -> torch.Tensor:
        """Give float32 values of patches: the AutoProcessor's own to the bit, which folds the factor in.

        Args:
            pixels: [patches, channels·…], of an image one temporal slice, of a clip all of them.
            kind: Of what they are, `image` or `video`: each has a processor of its own.
        """
        import torch

        if pixels.dtype != torch.uint8:
            return pixels
        own = getattr(self.processor, f"{kind}_processor")
        mean, deviation = (
            (torch.tensor(value) * (1.0 / own.rescale_factor)).view(1, self.shape.channels, 1).to(pixels.device)
            for value in (own.image_mean, own.image_std)
        )
        return pixels.view(len(pixels), self.shape.channels, -1).float().sub_(mean).div_(deviation).flatten(1)


def normalising_later(processor: Any) -> dict[str, bool]:
    """Give what tells a processor of images or videos to leave rescaling and normalising to the encoder's device."""
    return {"do_rescale": False, "do_normalize": False} if processor.do_rescale and processor.do_normalize else {}


def small_inputs_of(processed: Mapping[str, Any], taken: frozenset[str], left_out: Collection[str]) -> dict[str, Any]:
    """Give what the language model takes beside features and grid, where it is small: no pixels, no masks of them.

    Args:
        processed: What a processor made of one item.
        taken: The names of what the full model's forward takes.
        left_out: Names that stand elsewhere.

    Raises:
        ItemError: It does not fit into a row.
    """
    import torch

    inputs: dict[str, Any] = {}
    for name in sorted((processed.keys() & taken) - set(left_out)):
        if "pixel" in name:
            continue
        values = torch.as_tensor(processed[name])
        inputs[name] = {"dtype": str(values.dtype).removeprefix("torch."), "shape": list(values.shape)}
        if values.numel() * 2 > MAX_JSON_BYTES:
            raise ItemError(f"its {name} has {values.numel():,} values, more than a row holds")
        inputs[name]["values"] = values.flatten().tolist()
    return inputs


def runs_of(placeholder: str, token: str) -> Runs:
    """Shorten a placeholder to runs: 1,280 tokens `token` are one."""
    parts = placeholder.replace(token, f"\0{token}\0").split("\0")
    return tuple((text, len(list(run))) for text, run in groupby(part for part in parts if part))


def load_preparer(checkpoint: Checkpoint, config: Any, *, min_pixels: int | None, max_pixels: int | None) -> Preparer:
    """Load the checkpoint's AutoProcessor, with the torchvision backend and the pixel limits in force.

    Args:
        checkpoint: Whose.
        config: The full model's config.
        min_pixels: None: the checkpoint's own.
        max_pixels: None: the checkpoint's own, but at most the family's default.

    Raises:
        ModelError: It cannot be loaded, or makes other patches than the encoder takes.
    """
    processor = load_processor(checkpoint, min_pixels=min_pixels, max_pixels=max_pixels)
    family, image_processor = checkpoint.family, processor.image_processor
    token = hf.image_token(checkpoint, config, processor.tokenizer)
    takes = forward_takes(class_of(checkpoint))
    if not family.fused_kernels:
        return Preparer(processor, family, token, takes)
    vision = config.vision_config.to_dict()  # with the class's own values where the file leaves them out
    shape = shape_of(vision, checkpoint.folder)
    check_processor(image_processor, vision, checkpoint.folder)
    return PatchPreparer(processor, family, token, takes, shape)


def load_processor(checkpoint: Checkpoint, *, min_pixels: int | None, max_pixels: int | None) -> Any:
    """Load the checkpoint's AutoProcessor with the pixel limits in force; see `pixel_limits`."""
    processor = hf.load_processor(checkpoint)
    with hf.transformers_errors(checkpoint):
        limits = pixel_limits(processor.image_processor, checkpoint.family, min_pixels, max_pixels)
    if limits is not None:
        processor.image_processor.size = {"shortest_edge": limits[0], "longest_edge": limits[1]}
    return processor


def has_pixel_limits(image_processor: Any) -> bool:
    """Say whether a processor resizes by the number of pixels, as Qwen-VL's do: to patches that are then merged."""
    size = getattr(image_processor, "size", None)
    edges = size is not None and "shortest_edge" in size and "longest_edge" in size
    return bool(edges and getattr(image_processor, "merge_size", None))


def pixel_limits(image_processor: Any, family: Family, low: int | None, high: int | None) -> tuple[int, int] | None:
    """Give the fewest and the most pixels after resizing; None for a processor that has no such limits.

    They are the checkpoint's own, but at most `Family.default_max_pixels` unless more are asked for.

    Raises:
        UsageError: They cross, or there are none to set.
    """
    if not has_pixel_limits(image_processor):
        if low is not None or high is not None:
            raise UsageError(
                f"the processor of {family.model_type} models resizes to fixed sizes: leave `min_pixels` and "
                "`max_pixels` out"
            )
        return None
    own = image_processor.size
    low = int(own["shortest_edge"]) if low is None else low
    if high is None:
        high = min(int(own["longest_edge"]), family.default_max_pixels or int(own["longest_edge"]))
    side = int(image_processor.patch_size) * int(image_processor.merge_size)
    if low < 1 or high < side * side:
        raise UsageError(f"`max_pixels` must be at least {side * side} (one token), `min_pixels` at least 1")
    if low > high:
        raise UsageError(f"`min_pixels` {low} is more than `max_pixels` {high}")
    return low, high


def pixel_settings(image_processor: Any, checkpoint: Checkpoint, prepare_on: str = "cpu") -> dict[str, Any]:
    """Give the processor's settings that decide pixels, with the limits in force and what resamples, and where.

    A family that names its fields has them as the processor does; of every other they are what the file says: an
    upgrade of transformers must not make another extraction config of the same checkpoint.
    """
    settings = dict(checkpoint.processor_settings)
    if has_pixel_limits(image_processor):
        settings["merge_size"] = int(image_processor.merge_size)
        settings["min_pixels"] = int(image_processor.size["shortest_edge"])
        settings["max_pixels"] = int(image_processor.size["longest_edge"])
    settings["backend"] = "torchvision"
    if prepare_on != "cpu":
        settings["prepared_on"] = prepare_on
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def check_kernels(kernels: str | None, family: Family) -> None:
    """UsageError for fused kernels of a family that has none."""
    if kernels == "fused" and not family.fused_kernels:
        raise UsageError(f"there are no fused kernels for {family.model_type} models: leave `kernels` out")


def check_shape(width: int, height: int, family: Family) -> None:
    """ItemError for an image slimmer than the processor takes."""
    long, short = max(width, height), min(width, height)
    if family.max_aspect_ratio is not None and long > family.max_aspect_ratio * short:
        raise ItemError(
            f"is {width}×{height}, slimmer than 1:{family.max_aspect_ratio:g}, which the model's processor refuses"
        )
