"""Run the encoder's forward pass, written for speed. transformers' own module is the reference, also in tests.

In: pixels of one temporal slice of images, float [patches, channels·patch²], or of both of clips [patches,
channels·temporal·patch²], and one grid (t, h, w) an item. Out: merged tokens [Σ t·h·w / merge², width], and as many
of every deepstack level. The same sums in another order: in float32 within 1e-5 of the
reference, relative; on CUDA within 1e-3, as transformers' patch embedding is a convolution there, whose operands cuDNN
rounds to TF32, and the one here a product in float32. Rows of this forward pass have `fused` in their extraction
config's `kernels`.

What is done otherwise: the MLP and the queries, keys and values go a few rows at a time, so that their wide
intermediates stay in the cache and the memory small; on a CPU weights are laid out once for oneDNN, which also
applies the activation as it writes, and multiplies for attention over long sequences (packed_attention.py); rotary
positions are written straight to where attention reads; neighbours of one size share an attention call, and on a GPU
many small ones of many sizes do (varlen_attention.py); patches are put into the order of windows as pixels; the patch
embedding is a matrix product, of one temporal slice where both are the same. docs/decisions.md has what each brings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from qvsplit.kernels.encoder_parts import BlockParts, EncoderParts, MergerParts, Positions, linear, take_parts
from qvsplit.kernels.packed_attention import LEAST, attend_packed, can_attend_packed
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


def fuse(module: Any, *, check: Callable[[], None] = lambda: None, attention: str = "auto") -> FusedEncoder:
    """Give the fused encoder that takes the place of transformers' `module`. Arguments: see `FusedEncoder`.

    Raises:
        ModelError: There is none for a module of its class.
    """
    return FusedEncoder(module, check=check, attention=attention)


class FusedEncoder:
    """The fused encoder. Takes the weights out of the module it is made from, which is of no use afterwards.

    Args:
        module: transformers' encoder, of one of the classes in encoder_parts.py.
        check: Called between layers; what it raises ends the pass.
        attention: "sdpa", a call of torch's for all neighbours of one size; "varlen", one call for all frames; "auto",
            whichever is the faster.
    """

    def __init__(self, module: Any, *, check: Callable[[], None] = lambda: None, attention: str = "auto") -> None:
        self.check = check
        self.attention = attention
        self._found: Found | None = None  # looked for when the first batch could use it
        parts = take_parts(module)
        self.device, self.dtype = parts.patches.device, parts.patches.dtype
        self.heads, self.scale, self.merge = parts.heads, parts.scale, parts.merge
        self.windows, self.full = parts.windows, parts.full
        self.rows = ROWS_CPU if self.device.type == "cpu" else ROWS_CUDA
        self.frequencies = parts.frequencies
        self.packed = self.device.type == "cpu" and can_pack(self.dtype)
        self.slices = parts.patches.shape[1], parts.patches.shape[2]
        self.embed = self._layer(linear(parts.patches.flatten(1), parts.patches_bias))
        self.embed_still = self._of_one_slice(parts)
        self.positions = None if parts.positions is None else _Positions(parts.positions)
        self.blocks = [_Block(self, block) for block in parts.blocks]
        self.levels = {layer: _Merger(self, merger) for layer, merger in parts.levels}
        self.merger = _Merger(self, parts.merger)

    def __call__(self, pixels: torch.Tensor, grids: Sequence[Grid], *, still: bool = True) -> list[torch.Tensor]:
        """Encode all items; their tokens come one behind the other. Shapes: see the module's docstring.

        Gives the merged output, then the deepstack levels in order, where the encoder has any: each [tokens, width].

        Args:
            pixels: Of `still` images one temporal slice, as both are alike; else of clips, both.
            grids: One an item.
            still: Whether the items are images.
        """
        with torch.inference_mode():
            order, windows = (None, None) if self.windows is None else windows_of(grids, self.windows)
            if order is not None:
                order = order.to(self.device)
                pixels = self._in_order(pixels, order)
            x = self._embedded(pixels, still)  # [patches, width]
            if self.positions is not None:
                self.positions.add(x, grids, self.rows)
            levels = self._apply_blocks(x, grids, order, windows)
            given = [self.merger(x), *levels]
            return given if order is None else [one[order.argsort()] for one in given]

    def _apply_blocks(
        self, x: torch.Tensor, grids: Sequence[Grid], order: torch.Tensor | None, windows: list[int] | None
    ) -> list[torch.Tensor]:
        """Change `x` [patches, width] as the layers do, in place; give the deepstack levels."""
        frames = [h * w for t, h, w in grids for _ in range(t)]
        heads = x.new_empty(3, self.heads, len(x), x.shape[1] // self.heads)  # queries, keys, values
        cos, sin = self._rotary(grids, order)
        within_frames = self._attention(frames, heads.shape[3])
        within_windows = within_frames if windows is None else self._attention(windows, heads.shape[3])
        levels = []
        for number, block in enumerate(self.blocks):
            self.check()
            block.attend(x, heads, cos, sin, within_frames if number in self.full else within_windows)
            block.apply_mlp(x)
            if number in self.levels:
                levels.append(self.levels[number](x))
        return levels

    def _of_one_slice(self, parts: EncoderParts) -> Layer | None:
        """Give the embedding of a still image's slice. In fewer bits the sum of two weights would be rounded again."""
        if self.dtype != torch.float32:
            return None
        return self._layer(linear(parts.patches.sum(2).flatten(1), parts.patches_bias))

    def _embedded(self, pixels: torch.Tensor, still: bool) -> torch.Tensor:
        if still and self.embed_still is not None:
            return self.embed_still(pixels)
        return self.embed(all_slices(pixels, *self.slices) if still else pixels)

    def _in_order(self, patches: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Put [patches, …] into the order of windows; the patches of a token stay together."""
        return patches.unflatten(0, (-1, self.merge**2))[order].flatten(0, 1)

    def _attention(self, sizes: Sequence[int], head_dim: int) -> Attention:
        """Choose how attention within sequences of these lengths is computed. RuntimeError where it cannot be so."""
        if self.attention == "varlen" or (self.attention == "auto" and _many_small(sizes)):
            found = self._varlen(head_dim)
            if found.function is not None:
                return _by_varlen(found.function, sizes, self.device)
            if self.attention == "varlen":
                raise RuntimeError(f"no attention over unequal lengths: {dict(found.lacks)}")
        packed = self.packed and self.dtype == torch.float32 and self.attention == "auto" and can_attend_packed()
        return functools.partial(_by_size, sizes=sizes, scale=self.scale, packed_from=LEAST if packed else None)

    def _varlen(self, head_dim: int) -> Found:
        if self._found is None:
            if self.scale == head_dim**-0.5:
                self._found = find_varlen(self.device, self.dtype, heads=self.heads, head_dim=head_dim)
            else:
                self._found = Found(None, None, {"all": f"scores are scaled by {self.scale}"})
        return self._found

    def _layer(self, layer: nn.Linear, then: str = "none") -> Layer:
        """Pack `layer` where that is possible; what is returned alone holds its weight."""
        return PackedLinear(layer, then) if self.packed else layer

    def _rotary(self, grids: Sequence[Grid], order: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute cosines and sines, float32 [patches, 1, 1, head_dim / 2]: rows' frequencies, then columns'."""
        places = []
        for t, h, w in grids:
            place = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))  # [2, h, w]
            place = place.reshape(2, h // self.merge, self.merge, w // self.merge, self.merge)
            places.append(place.transpose(2, 3).reshape(2, -1).repeat(1, t))  # as the processor orders patches
        place = torch.cat(places, 1).to(self.device).T  # [patches, 2]: in one copy, however many images there are
        place = place if order is None else self._in_order(place, order)
        angle = (place[..., None].float() * self.frequencies).flatten(1)[:, None, None]
        return angle.cos(), angle.sin()


class _Positions:
    """Learned position embeddings."""

    def __init__(self, parts: Positions) -> None:
        self.table = parts.table.detach().float()  # transformers sums them in float32
        self.how = parts.how

    def add(self, x: torch.Tensor, grids: Sequence[Grid], rows: int) -> None:
        """Add to `x` [patches, width], in place, what the table has for each patch of its image's grid."""
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights

        found = get_vision_interpolation_indices_and_weights(torch.tensor(grids), **self.how)
        places, weights = (one.to(x.device) for one in found)  # [patches, neighbours]
        for part, place, weight in zip(x.split(rows), places.split(rows), weights.split(rows), strict=True):
            part += nn.functional.embedding_bag(place, self.table, per_sample_weights=weight, mode="sum").to(x.dtype)


class _Block:
    """One layer of the encoder, in two steps that add to `x` [patches, width] in place."""

    def __init__(self, encoder: FusedEncoder, parts: BlockParts) -> None:
        self.rows = encoder.rows
        self.norm1, self.norm2 = parts.norm1, parts.norm2
        self.qkv, self.proj = encoder._layer(parts.qkv), encoder._layer(parts.proj)
        self.mlp = _gated_mlp(encoder, parts) if len(parts.mlp) == 3 else _plain_mlp(encoder, parts)

    def attend(
        self, x: torch.Tensor, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attention: Attention
    ) -> None:
        """Add attention as `attention` spans it. `heads` [3, heads, patches, head_dim] is overwritten."""
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
            rows += self.mlp(self.norm2(rows))


class _Merger:
    """Makes one row of merge² patches."""

    def __init__(self, encoder: FusedEncoder, parts: MergerParts) -> None:
        self.patches = encoder.merge**2
        self.rows = encoder.rows * self.patches
        self.norm, self.shuffles_first = parts.norm, parts.shuffles_first
        self.first, self.last = _activated(encoder, parts.first, parts.activation), encoder._layer(parts.last)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[patches, width] to [tokens, the output's width]."""
        merged = [self.last(self.first(self._normed(rows))) for rows in x.split(self.rows)]
        return torch.cat(merged) if len(merged) > 1 else merged[0]

    def _normed(self, rows: torch.Tensor) -> torch.Tensor:
        shape = (-1, self.patches * rows.shape[1])
        return self.norm(rows.view(shape)) if self.shuffles_first else self.norm(rows).view(shape)


def _plain_mlp(encoder: FusedEncoder, parts: BlockParts) -> Layer:
    up, down = parts.mlp
    quick = type(parts.activation).__name__ == "QuickGELUActivation"
    if quick and encoder.packed and encoder.dtype == torch.float32:
        # oneDNN's swish has no factor: it goes into the weights, which in fewer bits would round them
        up = linear(up.weight * QUICK_GELU, up.bias * QUICK_GELU)
        down = linear(down.weight / QUICK_GELU, down.bias)
        return _chain(encoder._layer(up, "swish"), encoder._layer(down))
    return _chain(_activated(encoder, up, quick_gelu if quick else parts.activation), encoder._layer(down))


def _gated_mlp(encoder: FusedEncoder, parts: BlockParts) -> Layer:
    gate, up, down = _activated(encoder, parts.mlp[0], parts.activation), *map(encoder._layer, parts.mlp[1:])

    def gated(x: torch.Tensor) -> torch.Tensor:
        return down(up.times(x, gate(x)) if isinstance(up, PackedLinear) else up(x) * gate(x))

    return gated


def _activated(encoder: FusedEncoder, layer: nn.Linear, activation: Layer) -> Layer:
    """Give the layer with its activation behind it; a packed one applies those that oneDNN has as it writes."""
    then = _then(activation) if encoder.packed else None
    return _chain(encoder._layer(layer), activation) if then is None else encoder._layer(layer, then)


def _then(activation: Layer) -> str | None:
    """Give oneDNN's name of an activation."""
    name = type(activation).__name__
    if name == "GELUTanh":
        return "gelu_tanh"
    if isinstance(activation, nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    return "swish" if name in ("SiLU", "SiLUActivation") else None


def _chain(first: Layer, then: Layer) -> Layer:
    return lambda x: then(first(x))


def windows_of(grids: Sequence[Grid], how: dict[str, Any]) -> tuple[torch.Tensor, list[int]]:
    """Give tokens in the order of windows, int64 [tokens], and the patches of each window.

    Args:
        grids: One an item.
        how: transformers' arguments for it.
    """
    from transformers.vision_utils import get_vision_window_index

    order, ends = get_vision_window_index(torch.tensor(grids), **how)
    return order, ends.diff().tolist()


def _many_small(sizes: Sequence[int]) -> bool:
    """Say whether calls by size would be many and small."""
    runs = sum(1 for _ in groupby(sizes))
    return runs >= VARLEN_RUNS and sum(sizes) <= runs * VARLEN_PATCHES


def _by_size(heads: torch.Tensor, *, sizes: Sequence[int], scale: float, packed_from: int | None) -> torch.Tensor:
    """Compute attention within sequences, a call for neighbours of one size; `packed_from`: see packed_attention.py."""
    attended = [
        _attend_packed(part, number, scale)
        if packed_from is not None and part.shape[2] >= packed_from * number
        else _attend_torch(part, number, scale)
        for part, number in _runs_of_one_size(heads, sizes)
    ]
    return torch.cat(attended) if len(attended) > 1 else attended[0]


def _by_varlen(varlen: Varlen, sizes: Sequence[int], device: torch.device) -> Attention:
    """Compute attention within sequences, one call for all."""
    ends, longest = ends_of(sizes, device), max(sizes)

    def attend(heads: torch.Tensor) -> torch.Tensor:
        q, k, v = heads.transpose(1, 2).unbind()  # [patches, heads, head_dim]
        return varlen(q, k, v, ends, longest).flatten(1)

    return attend


def _attend_torch(heads: torch.Tensor, number: int, scale: float) -> torch.Tensor:
    """Compute attention over `number` sequences of n: [3, heads, number·n, head_dim] to [number·n, width]."""
    q, k, v = heads.unflatten(2, (number, -1)).transpose(1, 2).unbind()  # [number, heads, n, head_dim]
    attended = nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    return attended.transpose(1, 2).reshape(-1, attended.shape[1] * attended.shape[3])


def _attend_packed(heads: torch.Tensor, number: int, scale: float) -> torch.Tensor:
    """Compute the same, one sequence after the other."""
    parts = [attend_packed(q, k, v, scale) for q, k, v in (part.unbind() for part in heads.chunk(number, 2))]
    return torch.cat(parts).flatten(1)


def _runs_of_one_size(heads: torch.Tensor, sizes: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
    """Cut `heads` into runs of sequences of equal length; give with each how many it has."""
    runs = [(size, len(list(run))) for size, run in groupby(sizes)]
    parts = heads.split([size * number for size, number in runs], dim=2)
    return [(part, number) for part, (_, number) in zip(parts, runs, strict=True)]


def all_slices(pixels: torch.Tensor, channels: int, temporal: int) -> torch.Tensor:
    """Repeat [patches, channels·patch²] to [patches, channels·temporal·patch²]: a still image's slices are alike."""
    return pixels.view(len(pixels), channels, 1, -1).expand(-1, -1, temporal, -1).reshape(len(pixels), -1)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """Compute quick GELU, x · sigmoid(1.702 x), with one intermediate where transformers has three. The same bits."""
    return (QUICK_GELU * x).sigmoid_().mul_(x)
