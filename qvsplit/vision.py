"""Pictures to embeddings: the checkpoint's AutoProcessor and its tower, loaded alone.

In: upright RGB pictures. Between: `Patches`, resized pixels as bytes with one `grid_thw` (t, h, w in patches) a
picture; they become the AutoProcessor's `pixel_values`, to the bit, on the tower's device. Out: one tensor
[t·h·w / merge², hidden_size] a picture, in the compute dtype. With `kernels` "reference" that is exactly what the whole
model's own tower gives for the same batch, with "fused" (tower.py) the same within rounding. Knows nothing of files,
rows or language.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvsplit import hf
from qvsplit.checkpoint import Checkpoint
from qvsplit.devices import dtype_name, has_bfloat16_units, is_out_of_memory
from qvsplit.errors import ModelError, PictureError, UsageError
from qvsplit.families import Family, settings_of
from qvsplit.recipe import PICTURE_POLICY, Recipe
from qvsplit.weights import VisionWeights, load_vision, stored_dtype

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from PIL import Image

    from qvsplit.tower import FusedTower

# Patches in one forward pass, where memory is no matter. A picture at the default cap has 5,120. A picture that is
# larger than the budget goes alone.
PATCH_BUDGET_CPU = 5_120
PATCH_BUDGET_CUDA = 24_576
LARGE_TOWER_BYTES = 1 << 28  # below that nobody waits long
MEMORY_SHARE = 0.5  # of what is free after loading that a forward pass may take


class Cancelled(Exception):
    """`Vision.cancel` was called."""


@dataclass(frozen=True)
class Patches:
    """One picture, ready for the tower. Both temporal slices of a still picture are alike: one is kept.

    `pixels` [t·h·w, channels·patch²] are uint8, not yet normalised; float32 where the processor does not normalise.
    """

    pixels: torch.Tensor
    grid_thw: tuple[int, int, int]

    @property
    def count(self) -> int:
        """Patches: t·h·w."""
        t, h, w = self.grid_thw
        return t * h * w


class Vision:
    """The vision half of one checkpoint, on one device, in one dtype.

    `kernels` chooses the forward pass: "reference", transformers' own, or "fused", which takes over its weights.
    """

    def __init__(
        self, family: Family, weights: VisionWeights, processor: Any, device: torch.device, kernels: str = "fused"
    ) -> None:
        self.family = family
        self.weights = weights
        self.image_processor = processor.image_processor
        self.device = device
        self.kernels = kernels
        self.config = weights.module.config
        self.dtype: torch.dtype = weights.module.dtype  # in which it computes
        self.load_seconds: dict[str, float] = {}  # what loading took, by its parts
        self._cancelled = threading.Event()
        self._fused: FusedTower | None = None
        if kernels == "fused":
            from qvsplit.tower import FusedTower

            self._fused = FusedTower(weights.module, check=self._check)
        else:
            for block in weights.module.blocks:
                block.register_forward_pre_hook(lambda *_: self._check())

    @property
    def hidden_size(self) -> int:
        """Width of a token: the tower's output, and the language model's input."""
        return int(self.config.hidden_size)

    @property
    def merge_size(self) -> int:
        """Patches along each side of the square that becomes one token."""
        return int(self.config.spatial_merge_size)

    def cancel(self) -> None:
        """Have an `encode` in another thread end soon, and every later one at once: they raise Cancelled."""
        self._cancelled.set()

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled

    def recipe(self, stored_dtype: str) -> Recipe:
        """The recipe of what `encode` gives, stored as `stored_dtype`."""
        return Recipe(
            family=self.family.model_type,
            tower=self.weights.fingerprint,
            processor=processor_recipe(self.image_processor, self.family),
            compute_dtype=dtype_name(self.dtype),
            stored_dtype=stored_dtype,
            pictures=PICTURE_POLICY,
            kernels=self.kernels,
        )

    def prepare(self, image: Image.Image | npt.NDArray[np.uint8]) -> Patches:
        """`image`, RGB or an array [height, width, 3], resized and cut by the checkpoint's own image processor.

        PictureError where the model takes no such shape.
        """
        import numpy as np

        pixels = image if isinstance(image, np.ndarray) else np.array(image)
        check_shape(pixels.shape[1], pixels.shape[0], self.family)
        later = {"do_rescale": False, "do_normalize": False} if self._normalises else {}
        try:
            features = self.image_processor(
                images=[pixels], input_data_format="channels_last", return_tensors="pt", **later
            )
        except Exception as error:
            if is_out_of_memory(error):
                raise PictureError("does not fit into memory") from None
            raise
        t, h, w = (int(n) for n in features["image_grid_thw"][0])
        values = features["pixel_values"]  # [patches, channels·temporal·patch²]
        slices = values.view(len(values), self.config.in_channels, self.config.temporal_patch_size, -1)
        return Patches(slices[:, :, 0].reshape(len(values), -1), (t, h, w))

    @property
    def _normalises(self) -> bool:
        return bool(self.image_processor.do_rescale and self.image_processor.do_normalize)

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32 values of one temporal slice, the AutoProcessor's own to the bit: it, too, folds the factor in."""
        import torch

        if pixels.dtype != torch.uint8:
            return pixels
        processor, channels = self.image_processor, self.config.in_channels
        mean, deviation = (
            (torch.tensor(value) * (1.0 / processor.rescale_factor)).view(1, channels, 1).to(pixels.device)
            for value in (processor.image_mean, processor.image_std)
        )
        return pixels.view(len(pixels), channels, -1).float().sub_(mean).div_(deviation).flatten(1)

    def pixel_values(self, patches: Patches) -> torch.Tensor:
        """What the AutoProcessor gives for the picture: float32 [patches, channels·temporal·patch²]."""
        return self._all_slices(self._normalised(patches.pixels))

    def _all_slices(self, values: torch.Tensor) -> torch.Tensor:
        from qvsplit.tower import all_slices

        return all_slices(values, self.config.in_channels, self.config.temporal_patch_size)

    @property
    def bytes_per_patch(self) -> int:
        """About what a forward pass takes of memory for each patch, on top of the tower.

        Pixels, the residual stream, queries, keys, values and what attention saw, twice; transformers' own forward
        also has the MLP's width twice, and takes turned queries and keys apart.
        """
        wide = 7 if self.kernels == "fused" else 7 + 2 * int(self.config.mlp_ratio) + 4
        pixels = 4 * self.config.in_channels * self.config.patch_size**2 * (1 + 2 * self.config.temporal_patch_size)
        return int(wide * self.config.embed_dim * self.dtype.itemsize + pixels)

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

        self._check()
        # pictures of one size side by side have one attention call; the reference sees the batch as it comes
        order = sorted(range(len(batch)), key=lambda n: batch[n].count) if self._fused else [*range(len(batch))]
        batch = [batch[number] for number in order]
        # [Σ t·h·w, channels·patch²]; a picture alone is not copied
        pixels = torch.cat([p.pixels for p in batch]) if len(batch) > 1 else batch[0].pixels
        counts = [patches.count // self.merge_size**2 for patches in batch]
        with torch.inference_mode():
            values = self._normalised(pixels.to(self.device))
            if self._fused is not None:
                merged = self._fused(values.to(self.dtype), [patches.grid_thw for patches in batch])
            else:
                grid = torch.tensor([patches.grid_thw for patches in batch])  # [pictures, 3]
                # cast as the whole model does: `pixel_values.type(visual.dtype)`
                full = self._all_slices(values).to(self.dtype)
                merged = self.weights.module(full, grid_thw=grid.to(self.device)).pooler_output
        if tuple(merged.shape) != (sum(counts), self.hidden_size):
            raise ModelError(f"the tower gave {list(merged.shape)} instead of {[sum(counts), self.hidden_size]}")
        given = dict(zip(order, torch.split(merged, counts), strict=True))
        return [given[number] for number in range(len(batch))]


def load(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    kernels: str = "fused",
) -> Vision:
    """The vision half of `checkpoint`, and its processor with the given pixel limits (None: see `pixel_limits`)."""
    began = [time.perf_counter()]
    processor = load_processor(checkpoint, min_pixels=min_pixels, max_pixels=max_pixels)
    began.append(time.perf_counter())
    weights = load_vision(checkpoint, device=device, dtype=dtype)
    began.append(time.perf_counter())
    if kernels == "reference":
        _spare_memory(weights.module)
    vision = Vision(checkpoint.family, weights, processor, device, kernels)
    began.append(time.perf_counter())
    parts = ("load processor", "load weights", "prepare weights")
    vision.load_seconds = {part: end - start for part, start, end in zip(parts, began, began[1:], strict=False)}
    return vision


def _spare_memory(tower: Any) -> None:
    """Quick GELU with one intermediate instead of three: the widest tensors of a forward pass. The same bits."""
    import torch
    from transformers.activations import QuickGELUActivation

    from qvsplit.tower import quick_gelu

    class LeanQuickGELU(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # [patches, mlp width]
            return quick_gelu(x)

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


def would_be_faster_in_bfloat16(vision: Vision, checkpoint: Checkpoint) -> bool:
    """Whether a tower of some size was widened to float32 on a CPU that could do without."""
    widened = dtype_name(vision.dtype) == "float32" and stored_dtype(checkpoint, "vision") == "bfloat16"
    large = vision.weights.tower_bytes >= LARGE_TOWER_BYTES
    return vision.device.type == "cpu" and widened and large and has_bfloat16_units()


def patch_budget(vision: Vision, free: int | None) -> int:
    """Patches in one forward pass where the user names none: as many as pay, if `free` bytes of memory are enough."""
    most = PATCH_BUDGET_CUDA if vision.device.type == "cuda" else PATCH_BUDGET_CPU
    return most if free is None else max(1, min(most, int(free * MEMORY_SHARE) // vision.bytes_per_patch))
