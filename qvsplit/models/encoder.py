"""The Encoder door, and its implementation: the vision encoder of a checkpoint, loaded alone.

In: upright RGB images. Between: `Prepared`, resized pixels as bytes; they become the AutoProcessor's `pixel_values`, to
the bit, on the encoder's device. Out: named tensors [n_tokens, width] an item, in the compute dtype. With kernels
"reference" that is exactly what the full model's own encoder gives for the same batch, with "fused" (kernels/) the same
within rounding. Knows nothing of files, rows or language.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.errors import ItemError, ModelError
from qvsplit.models.preparing import ImagePreparer, Prepared, Preparer, load_preparer, pixel_settings
from qvsplit.runtime.devices import dtype_name, has_bfloat16_units, is_out_of_memory
from qvsplit.sources.images import IMAGE_POLICY
from qvsplit.store.config import ExtractionConfig
from qvsplit.store.features import POOLER_OUTPUT, TensorSpec
from qvsplit.store.row import Runs
from qvsplit.weights import EncoderWeights, load_encoder_weights

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from qvsplit.kernels.fused_encoder import FusedEncoder

# Patches in one forward pass, where memory is no matter. An image at the default cap has 5,120. An image that is
# larger than the budget goes alone.
PATCH_BUDGET_CPU = 5_120
PATCH_BUDGET_CUDA = 24_576
LARGE_ENCODER_BYTES = 1 << 28  # below that nobody waits long
MEMORY_SHARE = 0.5  # of what is free after loading that a forward pass may take


class Cancelled(Exception):
    """`Encoder.cancel` was called."""


@dataclass(frozen=True)
class Encoded:
    """What an encoder gave for one item: features in the compute dtype, on the encoder's device.

    Attributes:
        tensors: By the names of the model's output, each [n_tokens, width].
        grid_thw, placeholder, inputs: As `Prepared` had them.
        shapes: The tensors' shapes in the model's output, where these are not [n_tokens, width].
    """

    tensors: Mapping[str, torch.Tensor]
    grid_thw: tuple[int, int, int] | None
    placeholder: Runs
    inputs: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class Encoder(Protocol):
    """What makes features of images."""

    @property
    def config(self) -> ExtractionConfig:
        """The extraction config of what it makes."""

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors that it makes."""

    @property
    def preparer(self) -> ImagePreparer:
        """What prepares an image for it; picklable, so that it can be done elsewhere."""

    def prepare(self, image: npt.NDArray[np.uint8]) -> Iterator[Prepared]:
        """Prepare an image [height, width, 3]; a clip gives several temporal slices. Raises ItemError."""

    def encode(self, batch: Sequence[Prepared]) -> Sequence[Encoded | ItemError]:
        """Encode; an item that is bad gives an ItemError in its place."""

    def join(self, slices: Sequence[Encoded]) -> Encoded:
        """Join the temporal slices of one item."""

    def cancel(self) -> None:
        """Have an `encode` in another thread end soon, and every later one at once: they raise Cancelled."""


@dataclass(frozen=True)
class EncoderSpec:
    """All that it takes to load an encoder, in this process or another. Picklable."""

    checkpoint: Checkpoint
    device: str
    dtype: str
    storage_dtype: str | None = None  # None: as computed
    min_pixels: int | None = None  # None: see `preparing.pixel_limits`
    max_pixels: int | None = None
    kernels: str = "fused"


class TransformersEncoder:
    """The vision encoder of one checkpoint, on one device, in one dtype.

    The forward pass is transformers' own ("reference") or "fused", which takes over its weights.
    """

    def __init__(self, spec: EncoderSpec, weights: EncoderWeights, preparer: Preparer) -> None:
        import torch

        self.spec = spec
        self.weights = weights
        self.preparer = preparer
        self.device = torch.device(spec.device)
        self.dtype: torch.dtype = weights.module.dtype  # in which it computes
        self.load_seconds: dict[str, float] = {}  # what loading took, by its parts
        self._vision_config = weights.module.config
        self.config = self._config()
        # a list with one tensor an image in the model's own output
        self.tensors = (TensorSpec(POOLER_OUTPUT, self.config.storage_dtype, self.width),)
        self._cancelled = threading.Event()
        # holds the event alone: no circle of references keeps the weights in memory once the encoder is dropped
        self._check_cancelled = check = functools.partial(_raise_if_set, self._cancelled)
        self._fused: FusedEncoder | None = None
        if spec.kernels == "fused":
            from qvsplit.kernels.fused_encoder import FusedEncoder

            self._fused = FusedEncoder(weights.module, check=check)
        else:
            for block in weights.module.blocks:
                block.register_forward_pre_hook(lambda *_: check())

    def _config(self) -> ExtractionConfig:
        family = self.preparer.family
        return ExtractionConfig(
            family=family.model_type,
            encoder=self.weights.fingerprint,
            processor=pixel_settings(self.preparer.processor.image_processor, family),
            compute_dtype=dtype_name(self.dtype),
            storage_dtype=self.spec.storage_dtype or dtype_name(self.dtype),
            images=dict(IMAGE_POLICY),
            kernels=self.spec.kernels,
        )

    @property
    def width(self) -> int:
        """Values a token: the encoder's output, and the language model's input."""
        return int(self._vision_config.hidden_size)

    def prepare(self, image: npt.NDArray[np.uint8]) -> Iterator[Prepared]:
        """Prepare an image [height, width, 3]."""
        yield self.preparer.prepare(image)

    def join(self, slices: Sequence[Encoded]) -> Encoded:
        """Give the only slice that an image has."""
        (only,) = slices
        return only

    def cancel(self) -> None:
        """Have `encode` end soon."""
        self._cancelled.set()

    def pixel_values(self, prepared: Prepared) -> torch.Tensor:
        """Give what the AutoProcessor gives for the image: float32 [patches, channels·temporal·patch²]."""
        return self._all_slices(self.preparer.normalised(prepared.pixels))

    def _all_slices(self, values: torch.Tensor) -> torch.Tensor:
        from qvsplit.kernels.fused_encoder import all_slices

        return all_slices(values, self._vision_config.in_channels, self._vision_config.temporal_patch_size)

    @property
    def bytes_per_patch(self) -> int:
        """About what a forward pass takes of memory for each patch, on top of the encoder.

        Pixels, the residual stream, queries, keys, values and what attention saw, twice; transformers' own forward
        also has the MLP's width twice, and takes turned queries and keys apart.
        """
        vision = self._vision_config
        wide = 7 if self._fused is not None else 7 + 2 * int(vision.mlp_ratio) + 4
        pixels = 4 * vision.in_channels * vision.patch_size**2 * (1 + 2 * vision.temporal_patch_size)
        return int(wide * vision.embed_dim * self.dtype.itemsize + pixels)

    def encode(self, batch: Sequence[Prepared]) -> list[Encoded | ItemError]:
        """Encode the batch in one forward pass.

        An image whose rows are not finite gives an ItemError in its place. When memory does not suffice the batch is
        halved, down to the single image, which then gives an ItemError.
        """
        import torch

        rows = self._forward_if_it_fits(batch)
        if rows is None:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(batch) == 1:
                patches = batch[0].patches
                return [ItemError(f"needs more memory than {self.device} has ({patches:,} patches)", "memory")]
            middle = len(batch) // 2
            return self.encode(batch[:middle]) + self.encode(batch[middle:])
        return [
            Encoded({POOLER_OUTPUT: one}, item.grid_thw, item.placeholder, item.inputs)
            if bool(torch.isfinite(one).all())
            else ItemError(f"the encoder gave values that are not finite in {dtype_name(one.dtype)}")
            for item, one in zip(batch, rows, strict=True)
        ]

    def _forward_if_it_fits(self, batch: Sequence[Prepared]) -> list[torch.Tensor] | None:
        """Give None when memory does not suffice. The error, and all its traceback holds, ends with this call."""
        try:
            return self._forward(batch)
        except Exception as error:
            if is_out_of_memory(error):
                return None
            raise

    def _forward(self, batch: Sequence[Prepared]) -> list[torch.Tensor]:
        import torch

        self._check_cancelled()
        # images of one size side by side have one attention call; the reference sees the batch as it comes
        order = sorted(range(len(batch)), key=lambda n: batch[n].patches) if self._fused else [*range(len(batch))]
        batch = [batch[number] for number in order]
        # [Σ t·h·w, channels·patch²]; an image alone is not copied
        pixels = torch.cat([p.pixels for p in batch]) if len(batch) > 1 else batch[0].pixels
        counts = [prepared.n_tokens for prepared in batch]
        with torch.inference_mode():
            values = self.preparer.normalised(pixels.to(self.device))
            if self._fused is not None:
                merged = self._fused(values.to(self.dtype), [prepared.grid_thw for prepared in batch])
            else:
                grid = torch.tensor([prepared.grid_thw for prepared in batch])  # [images, 3]
                # cast as the full model does: `pixel_values.type(visual.dtype)`
                full = self._all_slices(values).to(self.dtype)
                merged = self.weights.module(full, grid_thw=grid.to(self.device)).pooler_output
        if tuple(merged.shape) != (sum(counts), self.width):
            raise ModelError(f"the encoder gave {list(merged.shape)} instead of {[sum(counts), self.width]}")
        given = dict(zip(order, torch.split(merged, counts), strict=True))
        return [given[number] for number in range(len(batch))]


def _raise_if_set(cancelled: threading.Event) -> None:
    if cancelled.is_set():
        raise Cancelled


def load_encoder(spec: EncoderSpec) -> TransformersEncoder:
    """Load the encoder that `spec` describes, and nothing else of its checkpoint."""
    import torch

    began = [time.perf_counter()]
    preparer = load_preparer(spec.checkpoint, min_pixels=spec.min_pixels, max_pixels=spec.max_pixels)
    began.append(time.perf_counter())
    weights = load_encoder_weights(spec.checkpoint, device=torch.device(spec.device), dtype=getattr(torch, spec.dtype))
    began.append(time.perf_counter())
    if spec.kernels == "reference":
        _spare_memory(weights.module)
    encoder = TransformersEncoder(spec, weights, preparer)
    began.append(time.perf_counter())
    parts = ("load processor", "load weights", "prepare weights")
    encoder.load_seconds = {part: end - start for part, start, end in zip(parts, began, began[1:], strict=False)}
    return encoder


def _spare_memory(module: Any) -> None:
    """Compute quick GELU with one intermediate instead of three, the widest of a forward pass. The same bits."""
    import torch
    from transformers.activations import QuickGELUActivation

    from qvsplit.kernels.fused_encoder import quick_gelu

    class LeanQuickGELU(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # [patches, mlp width]
            return quick_gelu(x)

    for block in module.blocks:
        if type(block.mlp.act) is QuickGELUActivation:
            block.mlp.act = LeanQuickGELU()


def would_be_faster_in_bfloat16(encoder: TransformersEncoder) -> bool:
    """Say whether an encoder of some size was widened to float32 on a CPU that could do without."""
    stored = encoder.spec.checkpoint.stored_dtype("encoder")
    widened = dtype_name(encoder.dtype) == "float32" and stored == "bfloat16"
    large = encoder.weights.encoder_bytes >= LARGE_ENCODER_BYTES
    return encoder.device.type == "cpu" and widened and large and has_bfloat16_units()


def patch_budget(encoder: TransformersEncoder, free: int | None) -> int:
    """Give the patches in one forward pass where the user names none: as many as pay, if `free` bytes suffice."""
    most = PATCH_BUDGET_CUDA if encoder.device.type == "cuda" else PATCH_BUDGET_CPU
    return most if free is None else max(1, min(most, int(free * MEMORY_SHARE) // encoder.bytes_per_patch))
