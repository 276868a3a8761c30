"""The encoders that the hub's checkpoints of the Qwen-VL line have, at their true shapes, with random weights."""

from __future__ import annotations

import importlib
from typing import Any

_LARGE = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16}
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
    "Qwen3-VL 8B": (
        "qwen3_vl", "Qwen3VLVisionModel",
        _LARGE | {"out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]},
    ),
    "Qwen3.5 0.8B": (
        "qwen3_5", "Qwen3_5VisionModel",
        {"depth": 12, "hidden_size": 768, "intermediate_size": 3072, "num_heads": 12, "out_hidden_size": 1024,
         "patch_size": 16},
    ),
    "Qwen3.5 9B": ("qwen3_5", "Qwen3_5VisionModel", _LARGE | {"out_hidden_size": 4096}),
}  # fmt: skip


def build(name: str, *, device: Any, dtype: Any, depth: int | None = None) -> Any:
    """Give transformers' module of one of `SHAPES`, of its first `depth` layers where that is given."""
    import torch

    model_type, class_name, fields = SHAPES[name]
    if depth is not None:
        depth = min(depth, fields["depth"])
        fields = fields | {"depth": depth}
        for layers in ("fullatt_block_indexes", "deepstack_visual_indexes"):
            if layers in fields:
                fields[layers] = [layer for layer in fields[layers] if layer < depth]
    cls = getattr(importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}"), class_name)
    torch.manual_seed(0)
    with torch.device(device):
        module = cls._from_config(cls.config_class(**fields), dtype=dtype)
    return module.eval().requires_grad_(False)
