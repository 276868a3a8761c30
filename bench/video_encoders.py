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

from bench.machine import machine

GRID = (2, 20, 38)  # temporal steps, rows and columns of patches: 190 tokens a step
STEPS = 60  # a minute
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen2-VL": (
        "qwen2_vl", "Qwen2VisionTransformerPretrainedModel",
        {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14},
    ),
    "Qwen2.5-VL": (
        "qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel",
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "num_heads": 16,
         "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112, "patch_size": 14},
    ),
    "Qwen3-VL 2B, 4B": (
        "qwen3_vl", "Qwen3VLVisionModel",
        {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2048,
         "deepstack_visual_indexes": [5, 11, 17], "patch_size": 16},
    ),
    "Qwen3-VL 8B, Qwen3.5": (
        "qwen3_vl", "Qwen3VLVisionModel",
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096,
         "deepstack_visual_indexes": [8, 16, 24], "patch_size": 16},
    ),
}  # fmt: skip


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

    module = _encoder(name, told)
    patch = module.config.patch_size
    pixels = torch.randn(GRID[0] * GRID[1] * GRID[2], 3 * 2 * patch**2, dtype=module.dtype, device=told.device)
    grid = torch.tensor([GRID], device=told.device)
    count = sum(parameter.numel() for parameter in module.parameters())
    ways: dict[str, Callable[[], Any]] = {"transformers": lambda: module(pixels, grid_thw=grid)}
    seconds = {way: _median(run, told.rounds) for way, run in ways.items()}
    if SHAPES[name][0] == "qwen2_vl":
        from qvsplit.kernels.fused_encoder import fuse

        fused = fuse(module)
        seconds["fused"] = _median(lambda: fused(pixels, [GRID], still=False), told.rounds)
    return {"parameters": count, "seconds": seconds}


def _encoder(name: str, told: argparse.Namespace) -> Any:
    import torch
    import transformers

    model_type, class_name, fields = SHAPES[name]
    modeling = __import__(f"transformers.models.{model_type}.modeling_{model_type}", fromlist=[class_name])
    full = transformers.AutoConfig.for_model(model_type)
    config = type(full.vision_config)(**fields)
    with torch.device(told.device):
        module = getattr(modeling, class_name)._from_config(config, dtype=getattr(torch, told.dtype))
    return module.eval()


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
