"""What does each means in the encoder's forward pass bring? Side by side, in turn, in one process.

    python -m bench.encoder "Qwen2.5-VL" [--depth 9] [--only fused] [--rounds 5] [--dtype float32] [--small]

The encoder is one of `bench/encoder_shapes.py`, with random weights, of its first `--depth` layers (0: all), or a
checkpoint's folder. Forward passes alone, no images read:

    reference             transformers' own module
    fused                 all means together
    without packing       weights stay in torch's layout, and attention is torch's
    torch's attention     oneDNN multiplies weights only
    activation apart      the MLP's activation by itself, behind the packed product
    all rows              the MLP and the projections see all rows at once
    both slices           the patch embedding is multiplied with both temporal slices
    one by one            images of one size have an attention call each

Each is held against the reference: `off` is the largest distance of an output, relative. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.encoder_shapes import SHAPES, build
from bench.machine import machine
from qvsplit.kernels import fused_encoder as encoder
from qvsplit.kernels.fused_encoder import Grid, fuse
from qvsplit.kernels.packed_linear import PackedLinear, can_pack

BATCHES: dict[str, list[Grid]] = {
    "one of 4,900 patches": [(1, 70, 70)],
    "five of 1,024": [(1, 32, 32)] * 5,
    "sixteen of 256": [(1, 16, 16)] * 16,
}
SMALL: dict[str, list[Grid]] = {"two of 64": [(1, 8, 8)] * 2}
OF_PACKING = ("without packing", "torch's attention", "activation apart")  # elsewhere these are what "fused" is
Forward = Callable[[torch.Tensor, list[Grid]], list[torch.Tensor]]


def main() -> None:
    """Time every variant on every batch, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", help=f"{', '.join(SHAPES)}, or a checkpoint's folder")
    parser.add_argument("--depth", type=int, default=9)
    parser.add_argument("--only", nargs="*", help="variants beside the reference; all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="a batch of few patches, to see that it runs")
    told = parser.parse_args()
    device, dtype = torch.device(told.device), getattr(torch, told.dtype)
    module = _module(told, device, dtype)
    batches = SMALL if told.small else BATCHES
    flops = {name: _flops(module, grids) for name, grids in batches.items()}
    variants = dict(_variants(module, told.only))
    results = {}
    for name, grids in batches.items():
        results[name] = _batch(variants, grids, flops[name], told.rounds, module)
        print(f"\n{told.encoder}, {len(module.blocks)} layers: {name}")
        for variant, one in results[name].items():
            print(f"  {variant:20} {one['gflops']:6.0f} GFLOP/s  {one['of_reference']:5.2f} x  off by {one['off']:.1e}",
                  flush=True)  # fmt: skip
    print(json.dumps({"bench": "encoder", "machine": machine(), "encoder": told.encoder, "layers": len(module.blocks),
                      "device": told.device, "dtype": told.dtype, "results": results}))  # fmt: skip


def _module(told: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Any:
    if told.encoder in SHAPES:
        return build(told.encoder, device=device, dtype=dtype, depth=told.depth or None)
    from qvsplit.checkpoints.opening import open_checkpoint
    from qvsplit.weights import load_encoder_weights

    return load_encoder_weights(open_checkpoint(Path(told.encoder), "encoder"), device=device, dtype=dtype).module


def _flops(module: Any, grids: list[Grid]) -> int:
    """FLOPs of the matrix products for a batch: nothing else is counted."""
    frames = [h * w for t, h, w in grids for _ in range(t)]
    windows, full = frames, frozenset(getattr(module, "fullatt_block_indexes", ()))
    if hasattr(module, "window_size"):
        how = {name: getattr(module, name) for name in ("spatial_merge_size", "window_size", "patch_size")}
        windows = encoder.windows_of(grids, how)[1]
    patches, merge = sum(frames), int(module.spatial_merge_size) ** 2
    flops: int = 2 * patches * module.patch_embed.proj.weight.numel()
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Linear):
            flops += 2 * part.weight.numel() * (patches if name.startswith("blocks.") else patches // merge)
    width = module.blocks[0].attn.proj.weight.shape[0]
    for number in range(len(module.blocks)):
        flops += sum(4 * length**2 * width for length in (frames if number in full else windows))
    return flops


def _batch(
    variants: dict[str, Forward], grids: list[Grid], flops: int, rounds: int, module: Any
) -> dict[str, dict[str, float]]:
    device, dtype = module.device, module.dtype
    count, values = sum(h * w for _, h, w in grids), 3 * module.config.patch_size**2
    pixels = torch.randn(count, values, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    given: dict[str, list[torch.Tensor]] = {}
    for number in range(rounds + 1):  # the first is for warmth
        for name, forward in variants.items():
            began = time.perf_counter()
            given[name] = forward(pixels, grids)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {
        name: {
            "gflops": flops / taken / 1e9,
            "of_reference": median["reference"] / taken,
            "off": max(_off(*pair) for pair in zip(given[name], given["reference"], strict=True)),
        }
        for name, taken in median.items()
    }


def _off(given: torch.Tensor, truth: torch.Tensor) -> float:
    return float((given.float() - truth.float()).norm() / truth.float().norm())


def _variants(module: Any, only: list[str] | None) -> Iterator[tuple[str, Forward]]:
    yield "reference", _reference(module)
    ways: dict[str, AbstractContextManager[Any]] = {
        "fused": nullcontext(),
        "without packing": mock.patch.object(encoder, "can_pack", return_value=False),
        "torch's attention": mock.patch.object(encoder, "can_attend_packed", return_value=False),
        "activation apart": mock.patch.object(encoder.FusedEncoder, "_layer", _activation_apart),
        "all rows": mock.patch.multiple(encoder, ROWS_CPU=1 << 30, ROWS_CUDA=1 << 30),
        "both slices": mock.patch.object(encoder.FusedEncoder, "_of_one_slice", return_value=None),
        "one by one": mock.patch.object(encoder, "groupby", _apart),
    }
    packed = module.device.type == "cpu" and can_pack(module.dtype)
    for name, way in ways.items():
        if (packed or name not in OF_PACKING) and (only is None or name in only):
            with way:
                fused = fuse(copy.deepcopy(module))
            yield name, _in_way(fused, way)


def _in_way(fused: encoder.FusedEncoder, way: AbstractContextManager[Any]) -> Forward:
    def forward(pixels: torch.Tensor, grids: list[Grid]) -> list[torch.Tensor]:
        with way:
            return fused(pixels, grids)

    return forward


def _reference(module: Any) -> Forward:
    def forward(pixels: torch.Tensor, grids: list[Grid]) -> list[torch.Tensor]:
        with torch.inference_mode():
            grid = torch.tensor(grids, device=module.device)
            output = module(encoder.all_slices(pixels, 3, 2), grid_thw=grid)
            return [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]

    return forward


def _apart(sizes: list[int]) -> Iterator[tuple[int, list[int]]]:
    """Each frame a run of its own."""
    return ((size, [size]) for size in sizes)


def _activation_apart(self: encoder.FusedEncoder, linear: torch.nn.Linear, then: str = "none") -> encoder.Layer:
    """A packed product, and what torch has for the activation behind it."""
    layer = PackedLinear(linear)
    after = {
        "none": None,
        "swish": lambda x: torch.sigmoid(x).mul_(x),
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }[then]
    return layer if after is None else encoder._chain(layer, after)


if __name__ == "__main__":
    main()
