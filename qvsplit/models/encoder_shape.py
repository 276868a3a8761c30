"""The shape of an encoder of patches, whatever its family calls it: what a forward pass takes of memory and products.

Read off config.json's `vision_config`, under the names that transformers has for its fields; no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvsplit.errors import ModelError

WIDTHS_FUSED = 7  # of the residual stream, queries, keys, values, and what attention saw, twice
WIDTHS_REFERENCE = 11  # transformers' own takes turned queries and keys apart
_COUNTS = (
    "depth", "num_heads", "in_channels", "temporal_patch_size", "patch_size", "spatial_merge_size",
)  # fmt: skip
# what a processor calls what both it and the encoder must have
_SHARED = {
    "patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size", "merge_size": "spatial_merge_size",
}  # fmt: skip


@dataclass(frozen=True)
class EncoderShape:
    """An encoder of patches.

    Attributes:
        depth: Layers.
        channels, temporal, patch, merge: Colours, frames and pixels along a side of a patch; patches along a side of a
            token.
        width: Values a patch, between layers.
        mlp: Values a patch inside an MLP.
        gated: Whether an MLP has two matrices of that width, one of which gates the other.
        out: Values a token, of the language model's input.
        levels: Tensors [n_tokens, out] beside the merged output.
        window: Patches that attention sees in most layers, where that is not the frame.
        full: Layers that see the frame; all where there are no windows.
    """

    depth: int
    channels: int
    temporal: int
    patch: int
    merge: int
    width: int
    mlp: int
    gated: bool
    out: int
    levels: int
    window: int | None
    full: int

    def bytes_per_patch(self, itemsize: int, *, fused: bool) -> int:
        """About what a forward pass takes of memory for each patch, on top of the encoder.

        Pixels, what is as wide as the residual stream, and the outputs; transformers' own forward also has the MLP's
        width twice, of a gated one four times.
        """
        mlp = 0 if fused else (4 if self.gated else 2) * self.mlp
        wide = (WIDTHS_FUSED if fused else WIDTHS_REFERENCE) * self.width + mlp
        outputs = (1 + self.levels) * self.out // self.merge**2
        pixels = 4 * self.channels * self.patch**2 * (1 + 2 * self.temporal)
        return (wide + outputs) * itemsize + pixels

    def flops(self, patches: int) -> float:
        """Count what the matrix products of a frame's forward pass take, each multiply-add twice."""
        block = 4 * self.width**2 + (3 if self.gated else 2) * self.width * self.mlp
        embedding = self.width * self.channels * self.temporal * self.patch**2
        merger = (self.merge * self.width) ** 2 + self.width * self.out  # for a patch, of which merge² are a token
        seen = self.full * patches + (self.depth - self.full) * min(self.window or 0, patches)
        weights = embedding + self.depth * block + (1 + self.levels) * merger
        return 2.0 * patches * (weights + 2 * self.width * seen)


def shape_of(vision: Mapping[str, Any], folder: Path) -> EncoderShape:
    """Read the shape off a vision config: of Qwen2-VL, which has other names of widths, or a later one.

    Args:
        vision: All its fields, those that the file leaves out as well.
        folder: The checkpoint's, for messages.

    Raises:
        ModelError: No encoder has such a shape.
    """
    for name in _COUNTS:
        if not isinstance(vision[name], int) or vision[name] < 1:
            raise _wrong(folder, f"has {name} {vision[name]}, which must be a whole number of at least 1")
    depth, merge, patch = vision["depth"], vision["spatial_merge_size"], vision["patch_size"]
    is_first = vision.get("embed_dim") is not None
    width = int(vision["embed_dim" if is_first else "hidden_size"])
    if width % vision["num_heads"]:
        raise _wrong(folder, f"has {vision['num_heads']} heads, which do not divide its width of {width}")
    if vision["in_channels"] != 3:
        raise _wrong(folder, f"has in_channels {vision['in_channels']}, and images have 3")
    levels = list(vision.get("deepstack_visual_indexes") or ())
    if len(set(levels) & set(range(depth))) < len(levels):
        raise _wrong(folder, f"has {depth} layers, of which deepstack_visual_indexes {levels} must name each once")
    window, side = vision.get("window_size"), None
    if window is not None and (side := int(window) // merge // patch * merge) < 1:
        raise _wrong(folder, f"has window_size {window}, smaller than a token of {merge * patch} pixels")
    full = set(vision.get("fullatt_block_indexes") or ()) & set(range(depth))
    return EncoderShape(
        depth=depth,
        channels=vision["in_channels"],
        temporal=vision["temporal_patch_size"],
        patch=patch,
        merge=merge,
        width=width,
        mlp=int(width * vision["mlp_ratio"] if is_first else vision["intermediate_size"]),
        gated=window is not None,  # Qwen2.5-VL has both
        out=int(vision["hidden_size" if is_first else "out_hidden_size"]),
        levels=len(levels),
        window=None if side is None else side**2,
        full=depth if side is None else len(full),
    )


def check_processor(processor: Any, vision: Mapping[str, Any], folder: Path) -> None:
    """ModelError where a checkpoint's processor of images or videos makes other patches than its encoder takes."""
    for name, own in _SHARED.items():
        if getattr(processor, name) != vision[own]:
            raise _wrong(
                folder,
                f"has {own} {vision[own]}, and its {type(processor).__name__} {name} {getattr(processor, name)}",
            )


def _wrong(folder: Path, what: str) -> ModelError:
    return ModelError(f"{folder}: its vision encoder {what}; download the checkpoint again")
