"""Attention over long sequences in float32 on a CPU, by oneDNN's products.

In: queries, keys and values [heads, n, head_dim]. Out: [n, heads, head_dim]. torch's own attention multiplies small
blocks by another library, which on an AMD CPU takes nearly twice the time where n is in the thousands; below that it is
the faster, as nothing has to be laid out (docs/decisions.md).
"""

from __future__ import annotations

import torch

ROWS = 512  # queries at a time: their scores, [ROWS, n], are all that is held
LEAST = 2048  # patches, below which torch's own attention is used


def attend_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Compute attention within one sequence; scores are multiplied by `scale`."""
    heads, n, _ = q.shape
    out = q.new_empty(n, heads, v.shape[2])
    for head in range(heads):
        keys, values = _lay_out(k[head]), _lay_out(v[head].t().contiguous())
        for queries, rows in zip((q[head] * scale).split(ROWS), out[:, head].split(ROWS), strict=True):
            scores = _product(queries, keys)
            rows.copy_(_product(torch.softmax(scores, -1, out=scores), values))
    return out


def _lay_out(weight: torch.Tensor) -> torch.Tensor:
    laid: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    return laid


def _product(x: torch.Tensor, laid: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, laid, None, "none", [], "")
    return out
