"""Attention over long sequences in float32 on a CPU, by oneDNN's products.

In: queries, keys and values [heads, n, head_dim]. Out: [n, heads, head_dim]. torch's own attention multiplies small
blocks by another library, which on an AMD CPU takes up to 1.7 times as long where n is in the thousands; below some
hundreds it is the faster, as it takes all heads in one call (docs/decisions.md).
"""

from __future__ import annotations

import functools

import torch
from torch import nn

ROWS = 512  # queries at a time: their scores, [ROWS, n], are all that is held
LEAST = 512  # patches, below which torch's own attention is the faster


def attend_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Compute attention within one sequence; scores are multiplied by `scale`."""
    heads, n, _ = q.shape
    out = q.new_empty(n, heads, v.shape[2])
    size = n if n <= 2 * ROWS else ROWS
    for head in range(heads):
        keys, values = k[head], v[head].t()
        for queries, rows in zip((q[head] * scale).split(size), out[:, head].split(size), strict=True):
            scores = _product(queries, keys)
            rows.copy_(_product(torch.softmax(scores, -1, out=scores), values))
    return out


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute x · weightᵀ. `weight` is not laid out before: oneDNN does that as it goes, in less time."""
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


@functools.cache
def can_attend_packed() -> bool:
    """Say whether this torch has the operators, and gets the right sums from them."""
    if not torch.backends.mkldnn.is_available():
        return False
    q, k, v = torch.randn(3, 2, 24, 8, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(0, 1)
    try:
        return bool(torch.allclose(attend_packed(q, k, v, 0.5), expected, rtol=1e-4, atol=1e-5))
    except (AttributeError, RuntimeError, TypeError):  # operators that torch promises to nobody
        return False
