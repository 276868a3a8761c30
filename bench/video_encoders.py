"""Seconds that a minute of 720p takes in encoders of true shapes, on this machine: transformers' own, and fused.

    python -m bench.video_encoders [--rounds 3] [--dtype float32] [--device cpu] [--only NAME]

Encoders of random weights in the shapes that the hub's checkpoints have, at full depth. A minute at the default
settings is 60 temporal steps of 190 tokens (docs/models.md); timed is a slice of two steps, which is what a CPU gets at
once, the median of the rounds, times 30. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from bench.encoder_shapes import SHAPES, build
from bench.machine import machine

GRID = (2, 20, 38)  # temporal steps, rows and columns of patches: 190 tokens a step
STEPS = 60  # a minute


def main() -> None:
    """Time every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=SHAPES)
    told = parser.parse_args()
    results = {}
    for name in [told.only] if told.only else SHAPES:
        results[name] = found = _timed(name, told)
        ways = ", ".join(f"{way} {seconds:.1f} s" for way, seconds in found["seconds"].items())
        print(f"{name:24} {found['parameters'] / 1e6:6.0f} M parameters: {ways} a minute", flush=True)
    print(json.dumps({"bench": "video_encoders", "machine": machine(), "dtype": told.dtype, "device": told.device,
                      "results": results}))  # fmt: skip


def _timed(name: str, told: argparse.Namespace) -> dict[str, Any]:
    import torch

    from qvsplit.kernels.fused_encoder import fuse

    module = build(name, device=told.device, dtype=getattr(torch, told.dtype))
    patch = module.config.patch_size
    pixels = torch.randn(GRID[0] * GRID[1] * GRID[2], 3 * 2 * patch**2, dtype=module.dtype, device=told.device)
    grid = torch.tensor([GRID], device=told.device)
    count = sum(parameter.numel() for parameter in module.parameters())
    ways: dict[str, Callable[[], Any]] = {"transformers": lambda: module(pixels, grid_thw=grid)}
    seconds = {way: _median(run, told.rounds) for way, run in ways.items()}
    fused = fuse(module)
    seconds["fused"] = _median(lambda: fused(pixels, [GRID], still=False), told.rounds)
    return {"parameters": count, "seconds": seconds}


def _median(run: Callable[[], Any], rounds: int) -> float:
    import torch

    times = []
    with torch.inference_mode():
        for _ in range(rounds + 1):
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    return statistics.median(times[1:]) * STEPS / GRID[0]


if __name__ == "__main__":
    main()
