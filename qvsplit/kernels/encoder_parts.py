"""Take the parts of an encoder out of transformers' module, whatever the family calls them.

Three encoders, and those of other names and the same layers: Qwen2-VL's; Qwen2.5-VL's, with windows; Qwen3-VL's, with
learned positions and, in some, deepstack levels. A module lets go of what is taken: nothing may hold a plain weight
longer than it must, as what is made of it takes its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qvsplit.errors import ModelError

CLASSES = (
    "Qwen2VisionTransformerPretrainedModel",
    "Qwen2_5_VisionTransformerPretrainedModel",
    "Qwen2_5OmniVisionEncoder",
    "Qwen3VLVisionModel",
    "Qwen3VLMoeVisionModel",
    "Qwen3OmniMoeVisionEncoder",
    "Qwen3_5VisionModel",
    "Qwen3_5MoeVisionModel",
    "Qwen4ExpVisionModel",
)
GATED, PLAIN = ("gate_proj", "up_proj", "down_proj"), (("fc1", "fc2"), ("linear_fc1", "linear_fc2"))


@dataclass(frozen=True)
class BlockParts:
    """One layer. `mlp`: up and down, or gate, up and down."""

    norm1: nn.Module
    qkv: nn.Linear
    proj: nn.Linear
    norm2: nn.Module
    mlp: list[nn.Linear]
    activation: nn.Module


@dataclass(frozen=True)
class MergerParts:
    """What makes one token of merge² patches. `shuffles_first`: the norm sees the merged row, not each patch."""

    norm: nn.Module
    shuffles_first: bool
    first: nn.Linear
    activation: nn.Module
    last: nn.Linear


@dataclass(frozen=True)
class Positions:
    """Learned position embeddings of a square grid, resampled to each image's.

    Attributes:
        table: [side², width].
        how: transformers' arguments for the resampling.
    """

    table: torch.Tensor
    how: dict[str, Any]


@dataclass(frozen=True)
class EncoderParts:
    """An encoder's parts.

    Attributes:
        heads: Of attention.
        scale: That scores are multiplied by.
        merge: Rows and columns of patches that make a token.
        frequencies: Of the rotary positions, float32 [head_dim / 4].
        patches: The patch embedding's kernel, [width, channels, temporal, patch, patch].
        patches_bias: Its bias, [width].
        positions: What is added to the embedded patches.
        windows: transformers' arguments for cutting windows, where only the layers in `full` see whole frames.
        full: See `windows`.
        blocks: The layers, each taken out as it comes.
        merger: At the end.
        levels: Those of deepstack, each with the layer that it is behind.
    """

    heads: int
    scale: float
    merge: int
    frequencies: torch.Tensor
    patches: torch.Tensor
    patches_bias: torch.Tensor | None
    positions: Positions | None
    windows: dict[str, Any] | None
    full: frozenset[int]
    blocks: Iterator[BlockParts]
    merger: MergerParts
    levels: Iterator[tuple[int, MergerParts]]


def take_parts(module: Any) -> EncoderParts:
    """Take an encoder apart.

    Raises:
        ModelError: Its class is none of `CLASSES`.
    """
    if type(module).__name__ not in CLASSES:
        raise ModelError(f"no fused kernels for {type(module).__name__}: use `kernels=reference`")
    attention, convolution = module.blocks[0].attn, take(module.patch_embed, "proj")
    return EncoderParts(
        attention.num_heads, attention.scaling, module.spatial_merge_size, module.rotary_pos_emb.inv_freq.float(),
        convolution.weight, convolution.bias, _positions(module), _windows(module),
        frozenset(getattr(module, "fullatt_block_indexes", ())), (_block(block) for block in module.blocks),
        _merger(module.merger), _levels(module),
    )  # fmt: skip


def take(parent: Any, name: str) -> Any:
    """Take a part out of its module, which lets go of it."""
    child = getattr(parent, name)
    setattr(parent, name, None)
    return child


def _positions(module: Any) -> Positions | None:
    if not hasattr(module, "pos_embed"):
        return None
    how = {
        "num_grid_per_side": module.num_grid_per_side,
        "mode": module.interpolation_mode,
        "align_corners": module.interpolation_align_corners,
        "spatial_merge_size": module.spatial_merge_size,
    }
    return Positions(take(module, "pos_embed").weight, how)


def _windows(module: Any) -> dict[str, Any] | None:
    if not hasattr(module, "window_size"):
        return None
    return {name: getattr(module, name) for name in ("spatial_merge_size", "window_size", "patch_size")}


def _levels(module: Any) -> Iterator[tuple[int, MergerParts]]:
    if hasattr(module, "deepstack_visual_indexes"):
        for layer, merger in zip(module.deepstack_visual_indexes, module.deepstack_merger_list, strict=True):
            yield layer, _merger(merger)


def _block(block: Any) -> BlockParts:
    names = GATED if hasattr(block.mlp, GATED[0]) else next(names for names in PLAIN if hasattr(block.mlp, names[0]))
    return BlockParts(
        block.norm1, _qkv(block.attn), take(block.attn, "proj"), block.norm2,
        [take(block.mlp, name) for name in names], block.mlp.act if hasattr(block.mlp, "act") else block.mlp.act_fn,
    )  # fmt: skip


def _qkv(attention: Any) -> nn.Linear:
    return take(attention, "qkv") if hasattr(attention, "qkv") else _joined([take(attention, name) for name in "qkv"])


def _joined(layers: Sequence[nn.Linear]) -> nn.Linear:
    return linear(torch.cat([one.weight for one in layers]), torch.cat([one.bias for one in layers]))


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """Give a layer of this weight, [out, in]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer


def _merger(merger: Any) -> MergerParts:
    norm = merger.norm if hasattr(merger, "norm") else merger.ln_q
    shuffles_first = getattr(merger, "use_postshuffle_norm", False)
    if hasattr(merger, "linear_fc1"):
        return MergerParts(norm, shuffles_first, take(merger, "linear_fc1"), merger.act_fn, take(merger, "linear_fc2"))
    return MergerParts(norm, shuffles_first, take(merger.mlp, "0"), merger.mlp[1], take(merger.mlp, "2"))
