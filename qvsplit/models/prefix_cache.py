"""The KV prefix: keys and values of [system + images], computed once and shared by every question behind them.

Shapes: B questions, K key heads, q new tokens, s suffix tokens so far, n prefix tokens, D values a head. The attention
over a prefix and a suffix is `kernels/shared_prefix_attention.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

GROWTH = 32  # tokens by which a suffix's memory grows


@dataclass(frozen=True)
class Prefix:
    """What a model keeps of a prompt's beginning.

    `keys` and `values` are [K, n, D], one a layer, each on its layer's device. `next_position` is the M-RoPE position
    of a text token right behind it, by the model's own `get_rope_index`. It is neither n nor, behind a long video, one
    more than the largest position in the prefix.
    """

    input_ids: tuple[int, ...]
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    next_position: int

    def __len__(self) -> int:
        """Count the tokens, n."""
        return len(self.input_ids)


class Complete(Exception):
    """All keys and values of a prefill are there; what its last layer would do with them, nobody asks for."""


class Capture:
    """Stand where transformers expects a KV cache, and keep what a prefill computes.

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


class SuffixCache:
    """The questions of one batch: rows behind their prefixes, and the keys and values of their own tokens.

    `padding` is how many tokens each row is padded with on the left, so that the newest token of every row stands in
    the last column. Rows behind the same prefix should be neighbours.
    """

    def __init__(self, prefixes: Sequence[Prefix], padding: Sequence[int]) -> None:
        self.prefixes = list(prefixes)
        self.padding = list(padding)
        self.groups = _groups(self.prefixes)
        self.length = 0  # suffix tokens so far, s
        self._keys: list[torch.Tensor] = []  # [B, K, capacity, D], one a layer
        self._values: list[torch.Tensor] = []

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one layer's new tokens, [B, K, q, D]; gives all of its suffixes, [B, K, s, D]."""
        if layer == 0:
            self.length += keys.shape[2]
        return self._append(self._keys, keys, layer), self._append(self._values, values, layer)

    def _append(self, cached: list[torch.Tensor], new: torch.Tensor, layer: int) -> torch.Tensor:
        before = self.length - new.shape[2]
        if len(cached) == layer:
            cached.append(new.new_empty(*new.shape[:2], self.length + GROWTH, new.shape[3]))
        elif cached[layer].shape[2] < self.length:
            grown = new.new_empty(*new.shape[:2], self.length + GROWTH, new.shape[3])
            grown[:, :, :before] = cached[layer][:, :, :before]
            cached[layer] = grown
        cached[layer][:, :, before : self.length] = new
        return cached[layer][:, :, : self.length]

    def seen(self, new: int, device: torch.device) -> torch.Tensor | None:
        """Say what of its suffix each of `new` more tokens a row sees: bool [B, new, s + new]; None where all."""
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
        for cached in (self._keys, self._values):
            for layer, old in enumerate(cached):
                cached[layer] = old[list(rows)]

    def behind(self, prefix: Prefix, input_ids: Sequence[int], next_position: int) -> Prefix:
        """Join `prefix` and the tokens of the only row into one longer prefix."""
        longer = []
        for before, cached in ((prefix.keys, self._keys), (prefix.values, self._values)):
            longer.append(tuple(torch.cat([b, s[0, :, : self.length]], 1) for b, s in zip(before, cached, strict=True)))
        return Prefix(prefix.input_ids + tuple(input_ids), longer[0], longer[1], next_position)


class PrefixCache:
    """The last prefixes, kept for the next question; at most `tokens` of them, the longest unused go first."""

    def __init__(self, tokens: int) -> None:
        self._most = tokens
        self._cached: OrderedDict[Hashable, Prefix] = OrderedDict()

    def get(self, key: Hashable) -> Prefix | None:
        """Give the prefix cached under `key`, which is now the last used."""
        if key in self._cached:
            self._cached.move_to_end(key)
        return self._cached.get(key)

    def put(self, key: Hashable, prefix: Prefix) -> None:
        """Cache `prefix`; the newest stays even where it alone is too long, but for a bound of none at all."""
        self._cached.pop(key, None)
        if self._most > 0:
            self._cached[key] = prefix
        while len(self) > self._most and len(self._cached) > 1:
            self._cached.popitem(last=False)

    def clear(self) -> None:
        """Cache none."""
        self._cached.clear()

    def __len__(self) -> int:
        """Count the tokens of all prefixes in the cache."""
        return sum(map(len, self._cached.values()))


def _groups(prefixes: Sequence[Prefix]) -> list[tuple[Prefix, int, int]]:
    """Find runs of the same prefix: (prefix, first row, row after the last)."""
    groups: list[tuple[Prefix, int, int]] = []
    for row, prefix in enumerate(prefixes):
        if groups and groups[-1][0] is prefix:
            groups[-1] = (prefix, groups[-1][1], row + 1)
        else:
            groups.append((prefix, row, row + 1))
    return groups
