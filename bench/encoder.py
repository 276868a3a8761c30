"""What does each means in the encoder's forward pass bring? Side by side, in turn, in one process.

    python -m bench.encoder CHECKPOINT [--rounds 5] [--dtype float32] [--device cpu]

CHECKPOINT: `python -m tests.support.checkpoints DIR --shape 2b --vision-depth 4`. Forward passes alone, no images read:

    reference        transformers' own module
    fused            all means together
    without packing  weights stay in torch's layout
    without swish    quick GELU by itself, behind the packed product
    all rows         the MLP and the projections see all rows at once
    both slices      the patch embedding is multiplied with both temporal slices
    one by one       images of one size have an attention call each

Each is held against the reference. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.extract import encoder_flops
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.kernels import fused_encoder as encoder
from qvsplit.kernels.fused_encoder import FusedEncoder, Grid, fuse
from qvsplit.weights import load_encoder_weights

BATCHES: dict[str, list[Grid]] = {
    "one of 4,900 patches": [(1, 70, 70)],
    "five of 1,024": [(1, 32, 32)] * 5,
    "sixteen of 256": [(1, 16, 16)] * 16,
}
Forward = Callable[[torch.Tensor, list[Grid]], torch.Tensor]


def main() -> None:
    """Time every variant on every batch, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    told = parser.parse_args()
    device, dtype = torch.device(told.device), getattr(torch, told.dtype)
    variants, config = _variants(told.checkpoint, device, dtype)
    results = {}
    for name, grids in BATCHES.items():
        flops = sum(
            encoder_flops(h * w, width=config.embed_dim, depth=config.depth, out=config.hidden_size)
            for _, h, w in grids
        )
        results[name] = _batch(variants, grids, flops, told.rounds, device, dtype)
        print(f"\n{name}")
        for variant, one in results[name].items():
            print(f"  {variant:16} {one['gflops']:6.0f} GFLOP/s  {one['of_reference']:5.2f} x  off by {one['off']:.1e}")
    print(json.dumps({"bench": "encoder", "machine": platform.machine(), "cores": os.cpu_count(), "device": told.device,
                      "dtype": told.dtype, "results": results}))  # fmt: skip


def _batch(
    variants: dict[str, Forward], grids: list[Grid], flops: int, rounds: int, device: torch.device, dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    pixels = torch.randn(sum(h * w for _, h, w in grids), 588, device=device).to(dtype)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    given: dict[str, torch.Tensor] = {}
    for number in range(rounds + 1):  # the first is for warmth
        for name, forward in variants.items():
            began = time.perf_counter()
            given[name] = forward(pixels, grids)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    truth = given["reference"].float()
    return {
        name: {
            "gflops": flops / taken / 1e9,
            "of_reference": median["reference"] / taken,
            "off": float((given[name].float() - truth).norm() / truth.norm()),
        }
        for name, taken in median.items()
    }


def _variants(checkpoint: Path, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Forward], Any]:
    def load() -> Any:
        return load_encoder_weights(open_checkpoint(checkpoint, "encoder"), device=device, dtype=dtype).module

    reference = load()

    def whole(pixels: torch.Tensor, grids: list[Grid]) -> torch.Tensor:
        with torch.inference_mode():
            grid = torch.tensor(grids, device=device)
            out: torch.Tensor = reference(encoder.all_slices(pixels, 3, 2), grid_thw=grid).pooler_output
            return out

    provenance: dict[str, Forward] = {"reference": whole, "fused": _merged(fuse(load()))}
    with mock.patch.object(encoder, "can_pack", return_value=False):
        provenance["without packing"] = _merged(fuse(load()))
    with _without_swish():
        provenance["without swish"] = _merged(fuse(load()))
    with mock.patch.object(encoder, "ROWS_CPU", 1 << 30), mock.patch.object(encoder, "ROWS_CUDA", 1 << 30):
        provenance["all rows"] = _merged(fuse(load()))
    with mock.patch.object(torch.Tensor, "sum", _no_sum):
        unfolded = fuse(load())
    unfolded.embed_still = None
    provenance["both slices"] = _merged(unfolded)
    alone = _merged(fuse(load()))

    def one_by_one(pixels: torch.Tensor, grids: list[Grid]) -> torch.Tensor:
        with mock.patch.object(encoder, "groupby", _apart):
            return alone(pixels, grids)

    return provenance | {"one by one": one_by_one}, reference.config


def _merged(fused: FusedEncoder) -> Forward:
    return lambda pixels, grids: fused(pixels, grids)[0]


def _apart(frames: list[int]) -> Iterator[tuple[int, list[int]]]:
    """Each frame a run of its own."""
    return ((frame, [frame]) for frame in frames)


def _no_sum(tensor: torch.Tensor, *axes: int) -> torch.Tensor:
    return tensor


@contextmanager
def _without_swish() -> Iterator[None]:
    real = encoder.FusedEncoder._layer

    class Plain(torch.nn.Module):  # type: ignore[misc]
        """A packed product, and swish behind it."""

        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.layer(x)
            return torch.sigmoid(out).mul_(out)

    def layer(self: FusedEncoder, linear: Any, then: str = "none") -> Any:
        return Plain(real(self, linear)) if then == "swish" else real(self, linear, then)

    with mock.patch.object(encoder.FusedEncoder, "_layer", layer):
        yield


if __name__ == "__main__":
    main()
