"""Attention of many questions behind few prefixes, without copying a prefix for any of them.

Queries of all questions behind one prefix meet its keys in one matrix product, then their own suffix's keys, under one
softmax. That is the same sum as over the joined sequence, in another order (shared-prefix or cascade attention:
Hydragen, arXiv 2402.05099).

Shapes: B questions, H query heads on K key heads (G = H / K), q new tokens, s suffix tokens so far, n prefix tokens,
D values a head. Knows nothing of caches: it is handed `SharedPrefixes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "qvsplit_shared_prefix"  # what transformers knows `attention` by
SCORE_VALUES = 2 << 20  # attention scores computed at once: they stay in a CPU's cache


class KeysAndValues(Protocol):
    """A prefix's keys and values, [K, n, D], one a layer."""

    @property
    def keys(self) -> Sequence[torch.Tensor]:
        """Keys, one tensor a layer."""

    @property
    def values(self) -> Sequence[torch.Tensor]:
        """Values, one tensor a layer."""


class SharedPrefixes(Protocol):
    """What attention has to know of a batch: which of its rows stand behind which prefix."""

    @property
    def groups(self) -> Sequence[tuple[KeysAndValues, int, int]]:
        """Runs of rows behind the same prefix: (prefix, first row, row after the last)."""


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    suffixes: SharedPrefixes | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers asks for it: query [B, H, q, D], key and value [B, K, s, D] → [B, q, H, D].

    With `suffixes`, key and value are the suffixes' own, and every row sees its whole prefix before them;
    `attention_mask`, bool [B, q, s], says what of the suffix is seen, all where it is None. Without, it is
    transformers' own SDPA.
    """
    if suffixes is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
        return output, None
    rows, heads, new, width = query.shape
    output = torch.empty(rows, new, heads, width, dtype=query.dtype, device=query.device)
    for prefix, first, end in suffixes.groups:
        keys, values = prefix.keys[module.layer_idx].float(), prefix.values[module.layer_idx].float()
        own_keys, own_values = key[first:end].float(), value[first:end].float()
        scored = heads * (end - first) * (keys.shape[1] + key.shape[2])  # values, for one new token a row
        step = max(1, SCORE_VALUES // scored)
        for start in range(0, new, step):
            part = slice(start, start + step)
            some = query[first:end, :, part].float() * scaling
            known = key.shape[2] - new + start + some.shape[2]  # of the suffix: nobody sees what comes later
            seen = None if attention_mask is None else attention_mask[first:end, part, :known]
            output[first:end, part] = _attend(
                some, keys, values, own_keys[:, :, :known], own_values[:, :, :known], seen
            )
    return output, None


def _attend(
    query: torch.Tensor,
    prefix_keys: torch.Tensor,
    prefix_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor | None,
) -> torch.Tensor:
    """Take one softmax over prefix and suffix: scaled query [b, H, q, D] → [b, q, H, D].

    All float32, whatever the model's dtype, as SDPA's kernels have their scores and sums.
    """
    rows, heads, new, width = query.shape
    key_heads, n, s = keys.shape[1], prefix_keys.shape[1], keys.shape[2]
    group = heads // key_heads
    folded = query.reshape(rows, key_heads, group * new, width)
    by_head = folded.transpose(0, 1).reshape(key_heads, rows * group * new, width)
    scores = torch.empty(key_heads, rows * group * new, n + s, device=query.device)
    torch.bmm(by_head, prefix_keys.transpose(1, 2), out=scores[:, :, :n])
    own = torch.matmul(folded, keys.transpose(2, 3))  # [b, K, G·q, s]
    if seen is not None:
        own.view(rows, key_heads, group, new, s).masked_fill_(~seen[:, None, None], float("-inf"))
    scores[:, :, n:] = own.transpose(0, 1).reshape(key_heads, rows * group * new, s)
    weights = torch.softmax(scores, dim=-1)
    summed = torch.bmm(weights[:, :, :n], prefix_values).view(key_heads, rows, group * new, width)
    own_weights = weights[:, :, n:].reshape(key_heads, rows, group * new, s).transpose(0, 1)
    total = summed.transpose(0, 1) + torch.matmul(own_weights, values)  # [b, K, G·q, D]
    return total.reshape(rows, heads, new, width).transpose(1, 2)


AttentionInterface.register(ATTENTION, attention)
