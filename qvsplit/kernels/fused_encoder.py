"""Run the encoder's forward pass, written for speed. transformers' own module is the reference, also in tests.

In: pixels of one temporal slice of images, float [patches, channels·patch²], or of both of clips [patches,
channels·temporal·patch²], and one grid (t, h, w) an item. Out:
merged tokens [Σ t·h·w / merge², hidden_size]. The same sums in another order: in float32 within 1e-5 of the
reference, relative; on CUDA within 1e-3, as transformers' patch embedding is a convolution there, whose operands cuDNN
rounds to TF32, and the one here a product in float32. Rows of this forward pass have `fused` in their extraction
config's `kernels`.

What is done otherwise: the MLP and the queries, keys and values go a few rows at a time, so that their wide
intermediates stay in the cache and the memory small; on a CPU weights are laid out once for oneDNN, which also
applies quick GELU as it writes; rotary positions are written straight to where attention reads; neighbours of one
size share an attention call, and on a GPU many small ones of many sizes do (varlen_attention.py); the patch embedding
is a matrix product, of one temporal slice where both are the same. docs/decisions.md has what each brings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from qvsplit.errors import ModelError
from qvsplit.kernels.packed_linear import PackedLinear, can_pack
from qvsplit.kernels.varlen_attention import Found, Varlen, ends_of, find_varlen

Grid = tuple[int, int, int]
Layer = Callable[[torch.Tensor], torch.Tensor]
Attention = Callable[
    [torch.Tensor], torch.Tensor
]  # queries, keys, values [3, heads, patches, head_dim] to [patches, width]

# Rows that go through the MLP at a time: on a CPU 10 MB of intermediates in float32; a GPU wants work for all its units
ROWS_CPU, ROWS_CUDA = 512, 8192
QUICK_GELU = 1.702  # x · sigmoid(1.702 x)
# One call for frames of unequal sizes pays where calls by size are many and small: at least so many of them, of at most
# so many patches on average. Larger ones keep a GPU busy by themselves, and torch's own attention is the faster there.
VARLEN_RUNS, VARLEN_PATCHES = 8, 1024


class FusedEncoder:
    """The fused encoder. Takes the weights out of the module it is made from, which is of no use afterwards.

    Args:
        module: transformers' encoder.
        check: Called between layers; what it raises ends the pass.
        attention: "sdpa", a call for all neighbours of one size; "varlen", one call for all frames; "auto", whichever
            is the faster.
    """

    def __init__(self, module: Any, *, check: Callable[[], None] = lambda: None, attention: str = "auto") -> None:
        self.check = check
        self.attention = attention
        self._found: Found | None = None  # looked for when the first batch could use it
        parameter = module.blocks[0].mlp.fc2.weight
        self.device, self.dtype = parameter.device, parameter.dtype
        self.heads: int = module.blocks[0].attn.num_heads
        self.scale: float = module.blocks[0].attn.scaling
        self.merge: int = module.spatial_merge_size
        self.rows = ROWS_CPU if self.device.type == "cpu" else ROWS_CUDA
        self.frequencies = module.rotary_pos_emb.inv_freq.float()  # [head_dim / 4]
        self.packed = self.device.type == "cpu" and can_pack(self.dtype)
        self.slices = module.patch_embed.in_channels, module.patch_embed.temporal_patch_size
        self.folded = self.dtype == torch.float32  # in fewer bits the sum of two weights would be rounded once more
        whole, folded = _patch_embeddings(module)
        self.embed = self._layer(whole)
        self.embed_still = self._layer(folded) if self.folded else None
        self.blocks = [self._block(block) for block in module.blocks]
        merger = module.merger
        self.last_norm, activation = merger.ln_q, merger.mlp[1]
        fused = self.packed and type(activation) is nn.GELU and activation.approximate == "none"
        self.merge_in = self._layer(_take(merger.mlp, "0"), "gelu" if fused else "none")
        self.merge_act = None if fused else activation
        self.merge_out = self._layer(_take(merger.mlp, "2"))

    def __call__(self, pixels: torch.Tensor, grids: Sequence[Grid], *, still: bool = True) -> list[torch.Tensor]:
        """Encode all items; their tokens come one behind the other. Shapes: see the module's docstring.

        Gives the merged output, then the deepstack levels in order, where the encoder has any: each [tokens, width].

        Args:
            pixels: Of `still` images one temporal slice, as both are alike; else of clips, both.
            grids: One an item.
            still: Whether the items are images.
        """
        with torch.inference_mode():
            if still and self.embed_still is not None:
                x = self.embed_still(pixels)  # [patches, width]
            else:
                x = self.embed(all_slices(pixels, *self.slices) if still else pixels)
            cos, sin = self._rotary(grids)
            attention = self._attention(grids, x.shape[1] // self.heads)
            heads = x.new_empty(3, self.heads, len(x), x.shape[1] // self.heads)  # queries, keys, values
            for block in self.blocks:
                self.check()
                block.attend(x, heads, cos, sin, attention)
                block.apply_mlp(x)
            return [self._merged(x)]

    def _attention(self, grids: Sequence[Grid], head_dim: int) -> Attention:
        """Choose how attention within each frame is computed for this batch. RuntimeError where it cannot be so."""
        frames = _frames(grids)
        if self.attention == "varlen" or (self.attention == "auto" and _many_small(frames)):
            found = self._varlen(head_dim)
            if found.function is not None:
                return _by_varlen(found.function, frames, self.device)
            if self.attention == "varlen":
                raise RuntimeError(f"no attention over unequal lengths: {dict(found.lacks)}")
        return functools.partial(_by_size, grids=grids, scale=self.scale)

    def _varlen(self, head_dim: int) -> Found:
        if self._found is None:
            if self.scale == head_dim**-0.5:
                self._found = find_varlen(self.device, self.dtype, heads=self.heads, head_dim=head_dim)
            else:
                self._found = Found(None, None, {"all": f"scores are scaled by {self.scale}"})
        return self._found

    def _block(self, block: Any) -> _Block:
        return _Block(self, block)

    def _layer(self, linear: nn.Linear, then: str = "none") -> Layer:
        """Pack `linear` where that is possible; what is returned alone holds its weight."""
        return PackedLinear(linear, then) if self.packed else linear

    def _rotary(self, grids: Sequence[Grid]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute cosines and sines, float32 [patches, 1, 1, head_dim / 2]: rows' frequencies, then columns'."""
        places = []
        for t, h, w in grids:
            place = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))  # [2, h, w]
            place = place.reshape(2, h // self.merge, self.merge, w // self.merge, self.merge)
            places.append(place.transpose(2, 3).reshape(2, -1).repeat(1, t))  # as the processor orders patches
        place = torch.cat(places, 1).to(self.device)  # [2, patches]: in one copy, however many images there are
        angle = (place[..., None].float() * self.frequencies).transpose(0, 1).flatten(1)[:, None, None]
        return angle.cos(), angle.sin()

    def _merged(self, x: torch.Tensor) -> torch.Tensor:
        merged = [self._merge(rows) for rows in x.split(self.rows * self.merge**2)]
        return torch.cat(merged) if len(merged) > 1 else merged[0]

    def _merge(self, rows: torch.Tensor) -> torch.Tensor:
        inner = self.merge_in(self.last_norm(rows).view(-1, self.merge**2 * rows.shape[1]))
        return self.merge_out(inner if self.merge_act is None else self.merge_act(inner))


def fuse(module: Any, *, check: Callable[[], None] = lambda: None, attention: str = "auto") -> FusedEncoder:
    """Give the fused encoder that takes the place of transformers' `module`. Arguments: see `FusedEncoder`.

    Raises:
        ModelError: There is none for a module of its class.
    """
    if not _is(module, "Qwen2VisionTransformerPretrainedModel"):
        raise ModelError(f"no fused kernels for {type(module).__name__}: run it with --kernels reference")
    return FusedEncoder(module, check=check, attention=attention)


def _is(module: Any, name: str) -> bool:
    return type(module).__name__ == name


class _Block:
    """One layer of the encoder, in two steps that add to `x` [patches, width] in place."""

    def __init__(self, encoder: FusedEncoder, block: Any) -> None:
        self.rows = encoder.rows
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.qkv, self.proj = encoder._layer(_take(block.attn, "qkv")), encoder._layer(_take(block.attn, "proj"))
        activation = block.mlp.act
        quick = type(activation).__name__ == "QuickGELUActivation"
        fused = quick and encoder.packed and encoder.dtype == torch.float32
        up, down = _take(block.mlp, "fc1"), _take(block.mlp, "fc2")
        if fused:  # oneDNN's swish has no factor: it goes into the weights, which in fewer bits would round them
            up.weight, up.bias = nn.Parameter(up.weight * QUICK_GELU), nn.Parameter(up.bias * QUICK_GELU)
            down.weight = nn.Parameter(down.weight / QUICK_GELU)
        self.up, self.down = encoder._layer(up, "swish" if fused else "none"), encoder._layer(down)
        self.activation: Layer | None = None if fused else quick_gelu if quick else activation

    def attend(
        self, x: torch.Tensor, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attention: Attention
    ) -> None:
        """Add attention within each frame. `heads` [3, heads, patches, head_dim] is a buffer that is overwritten."""
        for rows, buffer, c, s in zip(
            x.split(self.rows), heads.split(self.rows, 2), cos.split(self.rows), sin.split(self.rows), strict=True
        ):
            self._project(rows, buffer.permute(2, 0, 1, 3), c, s)
        for rows, part in zip(x.split(self.rows), attention(heads).split(self.rows), strict=True):
            rows += self.proj(part)

    def _project(self, rows: torch.Tensor, buffer: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Write queries, keys and values of some rows to `buffer` [rows, 3, heads, head_dim], the first two rotated."""
        qkv = self.qkv(self.norm1(rows)).view(buffer.shape)
        buffer[:, 2] = qkv[:, 2]
        half = buffer.shape[-1] // 2
        rotated, first, second = buffer[:, :2], qkv[:, :2, :, :half].float(), qkv[:, :2, :, half:].float()
        torch.addcmul(first * cos, second, sin, value=-1, out=rotated[..., :half])
        torch.addcmul(second * cos, first, sin, out=rotated[..., half:])

    def apply_mlp(self, x: torch.Tensor) -> None:
        """Add the MLP, some rows at a time."""
        for rows in x.split(self.rows):
            inner = self.up(self.norm2(rows))
            rows += self.down(inner if self.activation is None else self.activation(inner))


def _frames(grids: Sequence[Grid]) -> list[int]:
    """Give the patches of every frame."""
    return [h * w for t, h, w in grids for _ in range(t)]


def _many_small(frames: Sequence[int]) -> bool:
    """Say whether calls by size would be many and small."""
    runs = sum(1 for _ in groupby(frames))
    return runs >= VARLEN_RUNS and sum(frames) <= runs * VARLEN_PATCHES


def _by_size(heads: torch.Tensor, *, grids: Sequence[Grid], scale: float) -> torch.Tensor:
    """Compute attention within each frame, a call for neighbours of one size."""
    return torch.cat([_attend_frames(part, number, scale) for part, number in _runs_of_one_size(heads, grids)])


def _by_varlen(varlen: Varlen, frames: Sequence[int], device: torch.device) -> Attention:
    """Compute attention within each frame, one call for all."""
    ends, longest = ends_of(frames, device), max(frames)

    def attend(heads: torch.Tensor) -> torch.Tensor:
        q, k, v = heads.transpose(1, 2).unbind()  # [patches, heads, head_dim]
        return varlen(q, k, v, ends, longest).flatten(1)

    return attend


def _attend_frames(heads: torch.Tensor, number: int, scale: float) -> torch.Tensor:
    """Compute attention over `number` frames of one size: [3, heads, number·n, head_dim] to [number·n, width]."""
    q, k, v = heads.unflatten(2, (number, -1)).transpose(1, 2).unbind()  # [number, heads, n, head_dim]
    attended = nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    return attended.transpose(1, 2).reshape(-1, attended.shape[1] * attended.shape[3])


def _runs_of_one_size(heads: torch.Tensor, grids: Sequence[Grid]) -> list[tuple[torch.Tensor, int]]:
    """Cut `heads` into runs of frames of equally many patches; give with each how many frames it has."""
    frames = _frames(grids)
    runs = [(size, len(list(run))) for size, run in groupby(frames)]
    parts = heads.split([size * number for size, number in runs], dim=2)
    return [(part, number) for part, (_, number) in zip(parts, runs, strict=True)]


def _patch_embeddings(module: Any) -> tuple[nn.Linear, nn.Linear]:
    """Give the convolution, whose kernel is its stride, as a matrix product: whole, and of one of two equal slices."""
    weight = _take(module.patch_embed, "proj").weight  # [width, channels, temporal, patch, patch]
    return _linear(weight), _linear(weight.sum(2))


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = nn.Parameter(weight.flatten(1), requires_grad=False)
    return linear


def all_slices(pixels: torch.Tensor, channels: int, temporal: int) -> torch.Tensor:
    """Repeat [patches, channels·patch²] to [patches, channels·temporal·patch²]: a still image's slices are alike."""
    return pixels.view(len(pixels), channels, 1, -1).expand(-1, -1, temporal, -1).reshape(len(pixels), -1)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """Compute quick GELU, x · sigmoid(1.702 x), with one intermediate where transformers has three. The same bits."""
    return (QUICK_GELU * x).sigmoid_().mul_(x)


def _take(parent: Any, name: str) -> Any:
    """Take a layer out of its module, which lets go of it: nothing may hold a plain weight longer than it must."""
    child = getattr(parent, name)
    setattr(parent, name, None)
    return child
