"""The widths of an encoder of patches, whatever its family calls them, and the memory that a forward pass takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WIDTHS_FUSED = 7  # of the residual stream, queries, keys, values, and what attention saw, twice
WIDTHS_REFERENCE = 11  # transformers' own takes turned queries and keys apart


@dataclass(frozen=True)
class EncoderShape:
    """An encoder of patches.

    Attributes:
        channels, temporal, patch, merge: Colours, frames and pixels along a side of a patch; patches along a side of a
            token.
        width: Values a patch, between layers.
        mlp: Values a patch inside an MLP.
        gated: Whether an MLP has two matrices of that width, one of which gates the other.
        out: Values a token, of the language model's input.
        levels: Tensors [n_tokens, out] beside the merged output.
    """

    channels: int
    temporal: int
    patch: int
    merge: int
    width: int
    mlp: int
    gated: bool
    out: int
    levels: int

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


def shape_of(module: Any) -> EncoderShape:
    """Read the shape off transformers' encoder: of Qwen2-VL, whose config has other names of widths, or a later one."""
    config = module.config
    is_first = hasattr(config, "embed_dim")
    width = config.embed_dim if is_first else config.hidden_size
    return EncoderShape(
        channels=int(config.in_channels),
        temporal=int(config.temporal_patch_size),
        patch=int(config.patch_size),
        merge=int(config.spatial_merge_size),
        width=int(width),
        mlp=int(width * config.mlp_ratio) if is_first else int(config.intermediate_size),
        gated=hasattr(module.blocks[0].mlp, "gate_proj"),
        out=int(config.hidden_size if is_first else config.out_hidden_size),
        levels=len(getattr(config, "deepstack_visual_indexes", None) or ()),
    )
