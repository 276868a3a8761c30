"""Rows, features and shards that no encoder made, for benchmarks of the store and of what is written from it."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from qvsplit.sources.images import IMAGE_POLICY
from qvsplit.store.config import ExtractionConfig, Provenance
from qvsplit.store.features import POOLER_OUTPUT, Features, StoredTensor, TensorSpec
from qvsplit.store.row import Row, placeholder_json
from qvsplit.store.schema import ShardSchema

NOBODY = Provenance("nobody/nothing", None, "cpu", {})


def schema(dtype: str, width: int) -> ShardSchema:
    """What shards of a Qwen2-VL declare."""
    processor = {"merge_size": 2, "min_pixels": 3136, "max_pixels": 1003520}
    config = ExtractionConfig("qwen2_vl", "0" * 64, processor, "float32", dtype, dict(IMAGE_POLICY), "fused")
    return ShardSchema(config, (TensorSpec(POOLER_OUTPUT, dtype, width),), (NOBODY,))


def row(root: str, path: str, n_tokens: int, **more: Any) -> Row:
    """A row of an image that was encoded; its hash is that of its path unless another is given."""
    given: dict[str, Any] = {
        "sha256": hashlib.sha256(path.encode()).hexdigest(), "size": 1, "status": "ok", "generation": 1, "version": "1",
        "mtime_ns": 1, "width": 28, "height": 28, "grid_thw": (1, 2, 2 * n_tokens), "n_tokens": n_tokens,
        "placeholder": placeholder_json([("<|image_pad|>", n_tokens)]), "inputs": "{}", "has_features": True,
    }  # fmt: skip
    return Row(root=root, path=path, **given | more)


def features(declared: ShardSchema, raw: npt.NDArray[np.uint8]) -> Features:
    """Features of these bytes, [n_tokens, bytes a token]."""
    (spec,) = declared.tensors
    placeholder = (("<|image_pad|>", len(raw)),)
    return Features(declared.config, {spec.key: StoredTensor(raw, spec.dtype)}, (1, 2, 2 * len(raw)), placeholder)
