"""The Encoder door, and its implementations: the vision encoder of a checkpoint, loaded alone.

In: upright RGB images, and sampled frames of clips. Between: `Prepared`, what the AutoProcessor makes of one, to the
bit; of a clip several temporal slices. Out: named tensors [n_tokens, width] of each, in the compute dtype. With kernels
"reference" that is exactly what the full model's own encoder gives for it alone, with "fused" (kernels/) the same
within rounding. Knows nothing of files, rows or language.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from qvsplit.checkpoints import hf
from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.checkpoints.model_class import features_of, wanted_arguments
from qvsplit.errors import ItemError, ModelError
from qvsplit.models.clips import ClipPreparer, load_clip_preparer
from qvsplit.models.device_preparing import DevicePreparer, on_device
from qvsplit.models.encoder_output import OutputTensor, output_tensors
from qvsplit.models.encoder_shape import EncoderShape
from qvsplit.models.preparing import (
    ImagePreparer,
    PatchPreparer,
    Prepared,
    Preparer,
    check_kernels,
    load_preparer,
    pixel_settings,
)
from qvsplit.models.sampling import VideoOptions
from qvsplit.runtime.devices import dtype_name, has_bfloat16_units, is_out_of_memory
from qvsplit.runtime.loading import PROCESSOR, OnLoad, nobody
from qvsplit.sources.images import IMAGE_POLICY
from qvsplit.store.config import ExtractionConfig
from qvsplit.store.features import DEEPSTACK_FEATURES, POOLER_OUTPUT, TensorSpec
from qvsplit.store.row import Runs
from qvsplit.weights import EncoderWeights, load_encoder_weights

if TYPE_CHECKING:
    import torch

    from qvsplit.kernels.fused_encoder import FusedEncoder

T = TypeVar("T")

# Patches in one forward pass, where memory is no matter. An image at the default cap has 5,120. An image that is
# larger than the budget goes alone.
PATCH_BUDGET_CPU = 5_120
PATCH_BUDGET_CUDA = 24_576
SLICE_BUDGET_CPU = 2_048  # of a slice of a clip: as fast on a CPU, and takes less memory
LARGE_ENCODER_BYTES = 1 << 28  # below that nobody waits long
MEMORY_SHARE = 0.5  # of what is free after loading that a forward pass may take


class Cancelled(Exception):
    """`Encoder.cancel` was called."""


@dataclass(frozen=True)
class Encoded:
    """What an encoder gave for one image or slice of a clip: features in the compute dtype, on the encoder's device.

    Attributes:
        tensors: By the names of the model's output, each [n_tokens, width].
        grid_thw, placeholder, inputs, kind: As `Prepared` had them.
        shapes: The tensors' shapes in the model's output, where these are not [n_tokens, width].
    """

    tensors: Mapping[str, torch.Tensor]
    grid_thw: tuple[int, int, int] | None
    placeholder: Runs
    inputs: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kind: str = "image"


class Encoder(Protocol):
    """What makes features of images and clips."""

    @property
    def config(self) -> ExtractionConfig:
        """The extraction config of what it makes."""

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors that it makes."""

    @property
    def preparer(self) -> ImagePreparer:
        """What prepares an image for it; picklable, so that it can be done elsewhere."""

    def encode(self, batch: Sequence[Prepared]) -> Sequence[Encoded | ItemError]:
        """Encode; an item that is bad gives an ItemError in its place."""

    def load_clips(self) -> Clips:
        """Load what clips need beside the encoder. ModelError where the model takes no videos."""

    def cancel(self) -> None:
        """Have an `encode` in another thread end soon, and every later one at once: they raise Cancelled."""


@dataclass(frozen=True)
class Clips:
    """What clips need beside the encoder.

    Attributes:
        preparer: What prepares a clip; picklable.
        config: The extraction config of their features.
    """

    preparer: ClipPreparer
    config: ExtractionConfig


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
    prepare_on: str = "cpu"  # or "device"; see models/device_preparing.py
    videos: VideoOptions = field(default_factory=VideoOptions)


class TransformersEncoder:
    """The vision encoder of one checkpoint, on one device, in one dtype: the full model's own `get_image_features`.

    Every image has a forward pass of its own, so that its features do not depend on its neighbours.
    """

    def __init__(self, spec: EncoderSpec, weights: EncoderWeights, preparer: Preparer) -> None:
        import torch

        self.spec = spec
        self.weights = weights
        self.preparer = preparer
        self.device = torch.device(spec.device)
        self.dtype: torch.dtype = weights.model.dtype  # in which it computes
        self.load_seconds: dict[str, float] = {}  # what loading took, by its parts
        self._cancelled = threading.Event()
        # holds the event alone: no circle of references keeps the weights in memory once the encoder is dropped
        self._check_cancelled = check = functools.partial(_raise_if_set, self._cancelled)
        self._watch(check)
        self.config = self._config()
        self.tensors = self._tensors()

    def _watch(self, check: Callable[[], None]) -> None:
        """Have `check` called before every layer of the encoder: a forward pass can be ended there."""
        import torch

        for module in self.weights.model.modules():
            if isinstance(module, torch.nn.ModuleList):
                for layer in module:
                    layer.register_forward_pre_hook(lambda *_: check())

    def _config(self) -> ExtractionConfig:
        return ExtractionConfig(
            family=self.preparer.family.model_type,
            encoder=self.weights.fingerprint,
            processor=pixel_settings(
                self.preparer.processor.image_processor, self.spec.checkpoint, self.spec.prepare_on
            ),
            compute_dtype=dtype_name(self.dtype),
            storage_dtype=self.spec.storage_dtype or dtype_name(self.dtype),
            images=dict(IMAGE_POLICY),
            kernels=self.spec.kernels,
        )

    def _tensors(self) -> tuple[TensorSpec, ...]:
        """Say what it gives, from what it gives for a small grey image."""
        import numpy as np

        with hf.transformers_errors(self.spec.checkpoint, "cannot encode images"):
            prepared = self.preparer.prepare(np.full((64, 64, 3), 128, np.uint8))
            output = self._features(prepared)
        if prepared.grid_thw is not None:
            by_grid = math.prod(prepared.grid_thw) // self.config.merge_size**2
            if by_grid != prepared.n_tokens:
                raise ModelError(
                    f"{self.spec.checkpoint.folder} cannot be split: its image of a grid that makes {by_grid} tokens "
                    f"has {prepared.n_tokens}, which no store can hold"
                )
        return tuple(
            TensorSpec(
                one.name, self.config.storage_dtype, int(one.rows.shape[1]), container=one.container, level=one.level
            )
            for one in output
        )

    def load_clips(self) -> Clips:
        """Load the video processor, and try it with this encoder on a small clip.

        Raises:
            ModelError: The model takes no videos, or none that can be stored beside its images.
            UsageError: Limits that its processor does not have.
        """
        preparer = load_clip_preparer(self.spec.checkpoint, self.preparer, self.spec.videos)
        with hf.transformers_errors(self.spec.checkpoint, "takes no videos"):
            whole, slices, still = preparer.trial()
            output, of_still = self._features(whole), self._features(still)
        if any(len(one.rows) != still.n_tokens for one in of_still):
            raise ModelError("the model drops tokens of frames that are alike, which no store can hold")
        specs = {(spec.key, spec.width) for spec in self.tensors}
        rows = {len(one.rows) for one in output}
        if {(one.key, int(one.rows.shape[1])) for one in output} != specs or rows != {whole.n_tokens}:
            raise ModelError("the model takes no videos that can be stored beside its images")
        preparer = replace(preparer, in_slices=bool(slices) and self._gives_the_same(output, slices))
        containers = {one.key: one.container for one in output}
        videos = {**preparer.settings, "in_slices": preparer.in_slices, "containers": containers}
        if whole.grid_thw is not None:  # some encoders merge frames as well
            videos["patches_a_token"] = math.prod(whole.grid_thw) // whole.n_tokens
        return Clips(preparer, replace(self.config, videos=videos))

    def _gives_the_same(self, output: Sequence[OutputTensor], slices: Sequence[Prepared]) -> bool:
        """Say whether the slices of a clip have the features of the whole: no frame attends to those of another."""
        import torch

        parts = [{one.key: one.rows for one in self._features(prepared)} for prepared in slices]
        return all(
            torch.allclose(torch.cat([part[one.key] for part in parts]), one.rows, rtol=0, atol=_close(one.rows))
            for one in output
        )

    def cancel(self) -> None:
        """Have `encode` end soon."""
        self._cancelled.set()

    @property
    def bytes_per_patch(self) -> int:
        """About what a forward pass takes of memory for each patch. Not known: every image goes alone anyway."""
        return 0

    def encode(self, batch: Sequence[Prepared]) -> list[Encoded | ItemError]:
        """Encode each image by itself.

        An image whose features are not finite, or which does not fit into memory, gives an ItemError in its place.
        """
        return [self._encode_one(prepared) for prepared in batch]

    def _encode_one(self, prepared: Prepared) -> Encoded | ItemError:
        import torch

        output = self._if_it_fits(lambda: self._features(prepared))
        if output is None:
            return _needs_memory(prepared, self.device)
        wrong = [one for one in output if len(one.rows) != prepared.n_tokens]
        if wrong:
            raise ModelError(
                f"the encoder gave {len(wrong[0].rows):,} rows of {wrong[0].name} for an item of "
                f"{prepared.n_tokens:,} tokens; {self.spec.checkpoint.folder} cannot be split"
            )
        if not all(bool(torch.isfinite(one.rows).all()) for one in output):
            return _not_finite(self.dtype)
        return Encoded(
            {one.key: one.rows for one in output}, prepared.grid_thw, prepared.placeholder, prepared.inputs,
            {one.key: one.shape for one in output if one.shape is not None}, prepared.kind,
        )  # fmt: skip

    def _features(self, prepared: Prepared) -> list[OutputTensor]:
        import torch

        self._check_cancelled()
        features = features_of(self.weights.model, prepared.kind)
        given = wanted_arguments(features, prepared.values)
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                given[name] = value.to(self.device, self.dtype if value.is_floating_point() else None)
        with torch.inference_mode():
            return output_tensors(features(**given, return_dict=True))

    def _if_it_fits(self, compute: Callable[[], T]) -> T | None:
        """Give None when memory does not suffice. The error, and all its traceback holds, ends with this call."""
        try:
            return compute()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if self.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
        return None


class PatchEncoder(TransformersEncoder):
    """An encoder of patches: many images in one forward pass, "fused", or one each, transformers' own ("reference").

    The fused one takes over its weights. The reference's products of other numbers of rows may be added up in another
    order: an image of few patches has other bits beside others than alone, as the full model has it.
    """

    preparer: PatchPreparer

    def _watch(self, check: Callable[[], None]) -> None:
        self.shape: EncoderShape = self.preparer.shape
        self._fused: FusedEncoder | None = None
        if self.spec.kernels == "fused":
            from qvsplit.kernels.fused_encoder import fuse

            self._fused = fuse(self.weights.module, check=check)
        else:
            super()._watch(check)

    def _tensors(self) -> tuple[TensorSpec, ...]:
        dtype, width, container = self.config.storage_dtype, self.shape.out, self.preparer.family.container
        levels = [TensorSpec(DEEPSTACK_FEATURES, dtype, width, container, level) for level in range(self.shape.levels)]
        return (TensorSpec(POOLER_OUTPUT, dtype, width, container), *levels)

    def pixel_values(self, prepared: Prepared) -> torch.Tensor:
        """Give what the AutoProcessor gives for the image: float32 [patches, channels·temporal·patch²]."""
        return self._all_slices(self.preparer.normalised(self._pixels(prepared)))

    def _pixels(self, prepared: Prepared) -> torch.Tensor:
        """Give the patches of an image or a slice of a clip: as they were prepared, or prepared here."""
        if isinstance(self.preparer, DevicePreparer) and prepared.kind == "image":
            return self.preparer.patches(prepared.values["decoded"].to(self.device), _grid(prepared))
        pixels: torch.Tensor = prepared.values["pixels" if prepared.kind == "image" else "pixel_values_videos"]
        return pixels

    def _all_slices(self, values: torch.Tensor) -> torch.Tensor:
        from qvsplit.kernels.fused_encoder import all_slices

        return all_slices(values, self.shape.channels, self.shape.temporal)

    @property
    def bytes_per_patch(self) -> int:
        """About what a forward pass takes of memory for each patch, on top of the encoder."""
        return self.shape.bytes_per_patch(self.dtype.itemsize, fused=self._fused is not None)

    def encode(self, batch: Sequence[Prepared]) -> list[Encoded | ItemError]:
        """Encode the batch in one forward pass, with the kernels "reference" in one for each image.

        An image whose rows are not finite gives an ItemError in its place. When memory does not suffice the batch is
        halved, down to the single image, which then gives an ItemError.
        """
        import torch

        if not batch:
            return []
        if self._fused is None and len(batch) > 1:
            return [one for prepared in batch for one in self.encode([prepared])]
        features = self._if_it_fits(lambda: self._forward(batch))
        if features is None:
            if len(batch) == 1:
                return [_needs_memory(batch[0], self.device)]
            middle = len(batch) // 2
            return self.encode(batch[:middle]) + self.encode(batch[middle:])
        every = [torch.isfinite(rows).all() for tensors in features for rows in tensors.values()]
        finite = torch.stack(every).view(len(batch), -1).all(1).tolist()  # the device is waited for once
        return [
            Encoded(tensors, item.grid_thw, item.placeholder, item.inputs, kind=item.kind)
            if is_finite
            else _not_finite(self.dtype)
            for item, tensors, is_finite in zip(batch, features, finite, strict=True)
        ]

    def _features(self, prepared: Prepared) -> list[OutputTensor]:
        (tensors,) = self._forward([prepared])
        return [OutputTensor(one.name, tensors[one.key], one.container, one.level) for one in self.tensors]

    def _forward(self, batch: Sequence[Prepared]) -> list[dict[str, torch.Tensor]]:
        """Give the tensors of each, by their keys; images go through in one pass and slices of clips in another."""
        rows: dict[int, dict[str, torch.Tensor]] = {}
        for kind in dict.fromkeys(one.kind for one in batch):
            numbers = [number for number, one in enumerate(batch) if one.kind == kind]
            rows |= zip(numbers, self._forward_of_one_kind([batch[number] for number in numbers]), strict=True)
        return [rows[number] for number in range(len(batch))]

    def _forward_of_one_kind(self, batch: Sequence[Prepared]) -> list[dict[str, torch.Tensor]]:
        import torch

        self._check_cancelled()
        # images of one size side by side have one attention call
        order = sorted(range(len(batch)), key=lambda n: batch[n].patches) if self._fused else [*range(len(batch))]
        batch = [batch[number] for number in order]
        of_images = batch[0].kind == "image"
        counts = [prepared.n_tokens for prepared in batch]
        with torch.inference_mode():
            # [Σ t·h·w, channels·patch²], of a clip both temporal slices; one alone is not copied
            every = [self._pixels(prepared) for prepared in batch]
            pixels = torch.cat(every) if len(batch) > 1 else every[0]
            del every
            values = self.preparer.normalised(pixels.to(self.device), batch[0].kind)
            grids = [_grid(prepared) for prepared in batch]
            if self._fused is not None:
                merged = self._fused(values.to(self.dtype), grids, still=of_images)
            else:
                grid = torch.tensor(grids)  # [items, 3]
                # cast as the full model does: `pixel_values.type(visual.dtype)`
                full = (self._all_slices(values) if of_images else values).to(self.dtype)
                output = self.weights.module(full, grid_thw=grid.to(self.device))
                merged = [output.pooler_output, *(getattr(output, DEEPSTACK_FEATURES, None) or ())]
        shapes, expected = [[*one.shape] for one in merged], [[sum(counts), one.width] for one in self.tensors]
        if shapes != expected:
            raise ModelError(f"the encoder gave {shapes} instead of {expected}")
        parts = zip(*(torch.split(one, counts) for one in merged), strict=True)  # an item's tensors
        keys = [one.key for one in self.tensors]
        given = {number: dict(zip(keys, tensors, strict=True)) for number, tensors in zip(order, parts, strict=True)}
        return [given[number] for number in range(len(batch))]


def _grid(prepared: Prepared) -> tuple[int, int, int]:
    assert prepared.grid_thw is not None, "an image of patches has a grid"
    return prepared.grid_thw


def _needs_memory(prepared: Prepared, device: torch.device) -> ItemError:
    return ItemError(f"needs more memory than {device} has ({prepared.patches:,} patches)", "memory")


def _not_finite(dtype: torch.dtype) -> ItemError:
    return ItemError(f"the encoder gave values that are not finite in {dtype_name(dtype)}")


def _close(rows: torch.Tensor) -> float:
    """Give the difference that another order of sums may make: some units in the last place of the largest value."""
    import torch

    return float(64 * torch.finfo(rows.dtype).eps * rows.abs().max())


def _raise_if_set(cancelled: threading.Event) -> None:
    if cancelled.is_set():
        raise Cancelled


def load_image_preparer(spec: EncoderSpec) -> Preparer:
    """Load what prepares images for the encoder that `spec` describes. It takes no weights."""
    config = hf.load_config(spec.checkpoint)
    preparer = load_preparer(spec.checkpoint, config, min_pixels=spec.min_pixels, max_pixels=spec.max_pixels)
    return on_device(preparer) if spec.prepare_on == "device" else preparer


def load_encoder(spec: EncoderSpec, on_load: OnLoad = nobody) -> TransformersEncoder:
    """Load the encoder that `spec` describes, and nothing else of its checkpoint; `on_load` hears of each part."""
    import torch

    family = spec.checkpoint.family
    check_kernels(spec.kernels, family)
    began = [time.perf_counter()]
    on_load(PROCESSOR, 0, 0)
    preparer = load_image_preparer(spec)
    began.append(time.perf_counter())
    weights = load_encoder_weights(
        spec.checkpoint, device=torch.device(spec.device), dtype=getattr(torch, spec.dtype), on_load=on_load
    )
    began.append(time.perf_counter())
    if not family.fused_kernels:
        # as transformers loads them: torch's matmul goes another way, with other rounding, for frozen weights
        weights.model.requires_grad_(True)
    elif spec.kernels == "reference":
        _spare_memory(weights.module)
    encoder = (PatchEncoder if family.fused_kernels else TransformersEncoder)(spec, weights, preparer)
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
        if type(getattr(block.mlp, "act", None)) is QuickGELUActivation:
            block.mlp.act = LeanQuickGELU()


def would_be_faster_in_bfloat16(encoder: TransformersEncoder) -> bool:
    """Say whether an encoder of some size was widened to float32 on a CPU that could do without."""
    stored = encoder.spec.checkpoint.stored_dtype("encoder")
    widened = dtype_name(encoder.dtype) == "float32" and stored == "bfloat16"
    large = encoder.weights.encoder_bytes >= LARGE_ENCODER_BYTES
    return encoder.device.type == "cpu" and widened and large and has_bfloat16_units()


def slice_budget(encoder: TransformersEncoder, budget: int) -> int:
    """Give the patches in one slice of a clip, where `budget` is that of a batch."""
    return budget if encoder.device.type == "cuda" else min(budget, SLICE_BUDGET_CPU)


def patch_budget(encoder: TransformersEncoder, free: int | None) -> int:
    """Give the patches in one batch where the user names none: as many as pay, if `free` bytes suffice."""
    most = PATCH_BUDGET_CUDA if encoder.device.type == "cuda" else PATCH_BUDGET_CPU
    if free is None or not encoder.bytes_per_patch:
        return most
    return max(1, min(most, int(free * MEMORY_SHARE) // encoder.bytes_per_patch))
