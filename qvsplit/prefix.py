"""The KV prefix: keys and values of [system + pictures], computed once and shared by every question behind them.

A batch holds many questions behind few prefixes. No prefix is ever copied for a question: queries of all questions
behind one prefix meet its keys in one matrix product, then their own tail's, under one softmax. That is the same sum
as over the joined sequence, in another order (shared-prefix or cascade attention: Hydragen, arXiv 2402.05099).

Shapes: B questions, H query heads on K key heads (G = H / K), q new tokens, s tail tokens so far, n prefix tokens,
D values a head.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "qvsplit_shared_prefix"  # what transformers knows `attention` by
SCORE_VALUES = 2 << 20  # attention scores computed at once: they stay in a CPU's cache
GROWTH = 32  # tokens by which a tail's memory grows


@dataclass(frozen=True)
class Prefix:
    """What a model keeps of a prompt's beginning.

    `keys` and `values` are [K, n, D], one a layer, each on its layer's device. `next_position` is the M-RoPE position
    of the next token: n plus transformers' `rope_deltas`, which belong to this prefix and to no other.
    """

    input_ids: tuple[int, ...]
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    next_position: int

    def __len__(self) -> int:
        """Tokens, n."""
        return len(self.input_ids)


class Complete(Exception):
    """All keys and values of a prefill are there; what its last layer would do with them, nobody asks for."""


class Capture:
    """Stands where transformers expects a KV cache, and keeps what a prefill computes.

    With `layers`, raises Complete as soon as it has the last one's: a question sees of a prefix its keys and values,
    and nothing that comes after the last layer's.
    """

    def __init__(self, layers: int | None = None) -> None:
        self.keys: list[torch.Tensor] = []  # [K, n, D], one a layer
        self.values: list[torch.Tensor] = []
        self._layers = layers

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep one layer's, [1, K, n, D], and hand them on."""
        self.keys.append(keys[0].contiguous())
        self.values.append(values[0].contiguous())
        if len(self.keys) == self._layers:
            raise Complete
        return keys, values


class Tails:
    """The questions of one batch: rows behind their prefixes, and the keys and values of their own tokens.

    `padding` is how many tokens each row is padded with on the left, so that the newest token of every row stands in
    the last column. Rows behind the same prefix should be neighbours.
    """

    def __init__(self, prefixes: Sequence[Prefix], padding: Sequence[int]) -> None:
        self.prefixes = list(prefixes)
        self.padding = list(padding)
        self.groups = _groups(self.prefixes)
        self.length = 0  # tail tokens so far, s
        self._keys: list[torch.Tensor] = []  # [B, K, capacity, D], one a layer
        self._values: list[torch.Tensor] = []

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one layer's new tokens, [B, K, q, D]; gives all its tail's, [B, K, s, D]."""
        if layer == 0:
            self.length += keys.shape[2]
        return self._append(self._keys, keys, layer), self._append(self._values, values, layer)

    def _append(self, store: list[torch.Tensor], new: torch.Tensor, layer: int) -> torch.Tensor:
        before = self.length - new.shape[2]
        if len(store) == layer:
            store.append(new.new_empty(*new.shape[:2], self.length + GROWTH, new.shape[3]))
        elif store[layer].shape[2] < self.length:
            grown = new.new_empty(*new.shape[:2], self.length + GROWTH, new.shape[3])
            grown[:, :, :before] = store[layer][:, :, :before]
            store[layer] = grown
        store[layer][:, :, before : self.length] = new
        return store[layer][:, :, : self.length]

    def seen(self, new: int, device: torch.device) -> torch.Tensor | None:
        """What of its tail each of `new` more tokens a row sees: bool [B, new, s + new]; None where that is all."""
        if new == 1 and not any(self.padding):
            return None
        total = self.length + new
        column = torch.arange(total, device=device)
        real = column >= torch.tensor(self.padding, device=device)[:, None]  # [B, s + new]
        causal = column <= torch.arange(self.length, total, device=device)[:, None]  # [new, s + new]
        return real[:, None] & causal

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        self.prefixes = [self.prefixes[row] for row in rows]
        self.padding = [self.padding[row] for row in rows]
        self.groups = _groups(self.prefixes)
        for store in (self._keys, self._values):
            for layer, old in enumerate(store):
                store[layer] = old[list(rows)]

    def behind(self, prefix: Prefix, input_ids: Sequence[int], next_position: int) -> Prefix:
        """`prefix` and the tokens of the only row, as one longer prefix."""
        longer = []
        for before, store in ((prefix.keys, self._keys), (prefix.values, self._values)):
            longer.append(tuple(torch.cat([b, s[0, :, : self.length]], 1) for b, s in zip(before, store, strict=True)))
        return Prefix(prefix.input_ids + tuple(input_ids), longer[0], longer[1], next_position)


class Warm:
    """The last prefixes, kept for the next question; at most `tokens` of them, the longest unused go first."""

    def __init__(self, tokens: int) -> None:
        self._most = tokens
        self._kept: OrderedDict[Hashable, Prefix] = OrderedDict()

    def get(self, key: Hashable) -> Prefix | None:
        """The prefix kept under `key`, which is now the last used."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Hashable, prefix: Prefix) -> None:
        """Keep `prefix`; the newest stays even where it alone is too long, but for a bound of none at all."""
        self._kept.pop(key, None)
        if self._most > 0:
            self._kept[key] = prefix
        while len(self) > self._most and len(self._kept) > 1:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """Keep none."""
        self._kept.clear()

    def __len__(self) -> int:
        """Tokens of all prefixes kept."""
        return sum(map(len, self._kept.values()))


def _groups(prefixes: Sequence[Prefix]) -> list[tuple[Prefix, int, int]]:
    """Runs of the same prefix: (prefix, first row, row after the last)."""
    groups: list[tuple[Prefix, int, int]] = []
    for row, prefix in enumerate(prefixes):
        if groups and groups[-1][0] is prefix:
            groups[-1] = (prefix, groups[-1][1], row + 1)
        else:
            groups.append((prefix, row, row + 1))
    return groups


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    tails: Tails | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: query [B, H, q, D], key and value [B, K, s, D] → [B, q, H, D].

    With `tails`, key and value are the tails' own, and every row sees its whole prefix before them;
    `attention_mask`, bool [B, q, s], says what of the tail is seen, all where it is None. Without, it is
    transformers' own SDPA.
    """
    if tails is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
        return output, None
    width = query.shape[3]
    output = torch.empty(query.shape[0], query.shape[2], query.shape[1], width, dtype=query.dtype, device=query.device)
    for prefix, first, end in tails.groups:
        keys, values = prefix.keys[module.layer_idx].float(), prefix.values[module.layer_idx].float()
        own_keys, own_values = key[first:end].float(), value[first:end].float()
        scored = query.shape[1] * (end - first) * (keys.shape[1] + key.shape[2])  # values, for one new token a row
        step = max(1, SCORE_VALUES // scored)
        for start in range(0, query.shape[2], step):
            part = slice(start, start + step)
            some = query[first:end, :, part].float() * scaling
            known = key.shape[2] - query.shape[2] + start + some.shape[2]  # of the tail: nobody sees what comes later
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
    """One softmax over prefix and tail: scaled query [b, H, q, D] → [b, q, H, D].

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
