"""Bytes to torch's tensors. Whoever calls this wants torch; nothing else below the models imports it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch


def as_torch(values: npt.NDArray[Any], dtype: str) -> torch.Tensor:
    """Give values as a tensor on the CPU, bit for bit.

    Args:
        values: uint8 [n_tokens, bytes a token], little-endian values of `dtype`; or, where `dtype` is int8, the
            float32 values that those stand for.
        dtype: float32, bfloat16, float16 or int8.
    """
    import torch

    tensor = torch.from_numpy(values)
    return tensor if dtype == "int8" else tensor.view(getattr(torch, dtype))
