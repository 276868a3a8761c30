"""Pictures to embeddings: the checkpoint's AutoProcessor and its tower, loaded alone.

In: upright RGB pictures. Between: `pixel_values` float32 [patches, channels·temporal·patch²] and one `grid_thw`
(t, h, w in patches) a picture. Out: one tensor [t·h·w / merge², hidden_size] a picture, in the compute dtype,
exactly what the whole model's own tower gives for the same batch. Knows nothing of files, rows or language.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvsplit import hf
from qvsplit.checkpoint import Checkpoint
from qvsplit.devices import dtype_name, is_out_of_memory
from qvsplit.errors import ModelError, PictureError, UsageError
from qvsplit.families import Family, settings_of
from qvsplit.recipe import PICTURE_POLICY, Recipe
from qvsplit.weights import VisionWeights, load_vision

if TYPE_CHECKING:
    import torch
    from PIL import Image

# Patches in one forward pass. A picture at the default cap has 5,120; activations take about 60 kB a patch in float32
# on a 2B's tower. A picture that is larger than the budget goes alone.
PATCH_BUDGET_CPU = 5_120
PATCH_BUDGET_CUDA = 32_768


@dataclass(frozen=True)
class Patches:
    """One picture, ready for the tower."""

    pixel_values: torch.Tensor  # float32 [t·h·w, channels·temporal·patch²]
    grid_thw: tuple[int, int, int]

    @property
    def count(self) -> int:
        """Patches: t·h·w."""
        t, h, w = self.grid_thw
        return t * h * w


class Vision:
    """The vision half of one checkpoint, on one device, in one dtype."""

    def __init__(self, family: Family, weights: VisionWeights, processor: Any, device: torch.device) -> None:
        self.family = family
        self.weights = weights
        self.image_processor = processor.image_processor
        self.device = device

    @property
    def hidden_size(self) -> int:
        """Width of a token: the tower's output, and the language model's input."""
        return int(self.weights.module.config.hidden_size)

    @property
    def merge_size(self) -> int:
        """Patches along each side of the square that becomes one token."""
        return int(self.weights.module.config.spatial_merge_size)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.weights.module.dtype

    def recipe(self, stored_dtype: str) -> Recipe:
        """The recipe of what `encode` gives, stored as `stored_dtype`."""
        return Recipe(
            family=self.family.model_type,
            tower=self.weights.fingerprint,
            processor=processor_recipe(self.image_processor, self.family),
            compute_dtype=dtype_name(self.dtype),
            stored_dtype=stored_dtype,
            pictures=PICTURE_POLICY,
        )

    def prepare(self, image: Image.Image) -> Patches:
        """`image` through the checkpoint's own image processor. PictureError where the model takes no such shape."""
        check_shape(*image.size, self.family)
        try:
            features = self.image_processor(images=[image], return_tensors="pt")
        except Exception as error:
            if is_out_of_memory(error):
                raise PictureError("does not fit into memory") from None
            raise
        t, h, w = (int(n) for n in features["image_grid_thw"][0])
        return Patches(features["pixel_values"], (t, h, w))

    def encode(self, batch: Sequence[Patches]) -> list[torch.Tensor | PictureError]:
        """Embeddings [n_tokens, hidden_size] of each picture, on the tower's device, in one forward pass.

        A picture whose rows are not finite gives a PictureError in its place. When memory does not suffice the batch
        is halved, down to the single picture, which then gives a PictureError.
        """
        import torch

        rows = self._forward_if_it_fits(batch)
        if rows is None:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(batch) == 1:
                return [PictureError(f"needs more memory than {self.device} has ({batch[0].count:,} patches)")]
            middle = len(batch) // 2
            return self.encode(batch[:middle]) + self.encode(batch[middle:])
        return [
            one
            if bool(torch.isfinite(one).all())
            else PictureError(f"the tower gave values that are not finite in {dtype_name(one.dtype)}")
            for one in rows
        ]

    def _forward_if_it_fits(self, batch: Sequence[Patches]) -> list[torch.Tensor] | None:
        """None when memory does not suffice. The error, and all that its traceback holds, ends with this call."""
        try:
            return self._forward(batch)
        except Exception as error:
            if is_out_of_memory(error):
                return None
            raise

    def _forward(self, batch: Sequence[Patches]) -> list[torch.Tensor]:
        import torch

        # [Σ t·h·w, channels·temporal·patch²]; a picture alone is not copied
        pixels = torch.cat([p.pixel_values for p in batch]) if len(batch) > 1 else batch[0].pixel_values
        grid = torch.tensor([patches.grid_thw for patches in batch])  # [pictures, 3]
        counts = [patches.count // self.merge_size**2 for patches in batch]
        with torch.inference_mode():
            # cast before the copy as the whole model does: `pixel_values.type(visual.dtype)`
            pixels = pixels.to(self.device).to(self.dtype)
            merged = self.weights.module(pixels, grid_thw=grid.to(self.device)).pooler_output
        if tuple(merged.shape) != (sum(counts), self.hidden_size):
            raise ModelError(f"the tower gave {list(merged.shape)} instead of {[sum(counts), self.hidden_size]}")
        return list(torch.split(merged, counts))


def load(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Vision:
    """The vision half of `checkpoint`, and its processor with the given pixel limits (None: see `pixel_limits`)."""
    processor = load_processor(checkpoint, min_pixels=min_pixels, max_pixels=max_pixels)
    weights = load_vision(checkpoint, device=device, dtype=dtype)
    _spare_memory(weights.module)
    return Vision(checkpoint.family, weights, processor, device)


def _spare_memory(tower: Any) -> None:
    """Quick GELU with one intermediate instead of three: the widest tensors of a forward pass. The same bits."""
    import torch
    from transformers.activations import QuickGELUActivation

    class LeanQuickGELU(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # [patches, mlp width]
            return (1.702 * x).sigmoid_().mul_(x)

    for block in tower.blocks:
        if type(block.mlp.act) is QuickGELUActivation:
            block.mlp.act = LeanQuickGELU()


def load_processor(checkpoint: Checkpoint, *, min_pixels: int | None, max_pixels: int | None) -> Any:
    """The checkpoint's AutoProcessor with the torchvision backend and the pixel limits in force."""
    processor = hf.load_processor(checkpoint)
    with hf.transformers_errors(checkpoint):
        low, high = pixel_limits(processor.image_processor, checkpoint.family, min_pixels, max_pixels)
    processor.image_processor.size = {"shortest_edge": low, "longest_edge": high}
    merge = settings_of(checkpoint.vision_config, checkpoint.family.vision_settings)["spatial_merge_size"]
    if processor.image_processor.merge_size != merge:
        raise ModelError(
            f"{checkpoint.folder}: its processor merges {processor.image_processor.merge_size} patches a side, its "
            f"tower {merge}; download it again"
        )
    return processor


def pixel_limits(image_processor: Any, family: Family, low: int | None, high: int | None) -> tuple[int, int]:
    """The fewest and the most pixels after resizing.

    The checkpoint's own, but at most `Family.default_max_pixels` unless asked for more. UsageError if they cross.
    """
    own = image_processor.size
    low = int(own["shortest_edge"]) if low is None else low
    if high is None:
        high = min(int(own["longest_edge"]), family.default_max_pixels)
    side = int(image_processor.patch_size) * int(image_processor.merge_size)
    if low < 1 or high < side * side:
        raise UsageError(f"--max-pixels must be at least {side * side} (one token), --min-pixels at least 1")
    if low > high:
        raise UsageError(f"--min-pixels {low} is more than --max-pixels {high}")
    return low, high


def processor_recipe(image_processor: Any, family: Family) -> dict[str, Any]:
    """The processor's settings that decide pixels, with the limits in force and the backend that resamples."""
    settings = settings_of(image_processor.to_dict(), family.processor_settings)
    settings["min_pixels"] = int(image_processor.size["shortest_edge"])
    settings["max_pixels"] = int(image_processor.size["longest_edge"])
    settings["backend"] = "torchvision"
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def check_shape(width: int, height: int, family: Family) -> None:
    """PictureError for a picture slimmer than the processor takes."""
    long, short = max(width, height), min(width, height)
    if long > family.max_aspect_ratio * short:
        raise PictureError(
            f"is {width}×{height}, slimmer than 1:{family.max_aspect_ratio:g}, which the model's processor refuses"
        )


def default_patch_budget(device: torch.device) -> int:
    """Patches in one forward pass where the user names none."""
    return PATCH_BUDGET_CUDA if device.type == "cuda" else PATCH_BUDGET_CPU
