"""Names of dtypes, and their sizes in bytes. Imports nothing."""

from __future__ import annotations

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# int8: every token as whole numbers from -127 to 127, times a float32 scale of its own
STORAGE_DTYPES = (*DTYPE_BYTES, "int8")
SCALE_BYTES = 4
# Bytes in a shard over `token_bytes`: features of photographs, measured on Qwen2-VL's encoder, int8 on the demo's
# (docs/decisions.md); float16 lies between its neighbours
STORED_SHARE = {"float32": 0.87, "bfloat16": 0.70, "float16": 0.84, "int8": 1.01}


def token_bytes(storage_dtype: str, width: int) -> int:
    """Give the bytes of one token of `width` values before compression."""
    return width + SCALE_BYTES if storage_dtype == "int8" else width * DTYPE_BYTES[storage_dtype]
