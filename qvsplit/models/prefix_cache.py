"""The beginning of a prompt, up to its last image: computed once and shared by every question behind it.

Of layers with attention a prefix keeps keys and values, of recurrent ones (gated delta nets, short convolutions) the
state behind its last token. A batch's own tokens are in a `SuffixCache`; the attention over both is
`kernels/shared_prefix_attention.py`.

Shapes: B questions, K key heads, q new tokens, s suffix tokens so far, n prefix tokens, D values a head.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from qvsplit.kernels.prefix_products import PrefixProducts
from qvsplit.kernels.shared_prefix_attention import Packing, Step

LaidOut = dict[tuple[int, int], PrefixProducts]  # by prefix and layer
GROWTH = 32  # tokens by which a suffix's memory grows


class Beginning(Protocol):
    """A prompt's beginning, in whatever form a model's way of answering keeps it."""

    @property
    def input_ids(self) -> tuple[int, ...]:
        """Its tokens."""

    def __len__(self) -> int:
        """Count the tokens."""


@dataclass(frozen=True)
class Prefix:
    """What a model keeps of a prompt's beginning.

    Attributes:
        input_ids: Its tokens.
        keys: Keys [K, n, D], one tensor a layer, on the layer's device; an empty one for a recurrent layer. Of a layer
            with a window the last that a token behind the prefix sees.
        values: Likewise.
        next_position: The rotary position of a text token right behind it. It is neither n nor, behind a long video,
            one more than the largest position in the prefix.
        states: The recurrent layers, with one row each.
        windows: The layers with sliding windows: how many tokens a token sees of those up to itself.
    """

    input_ids: tuple[int, ...]
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    next_position: int
    states: Mapping[int, LinearAttentionLayer] = field(default_factory=dict)
    windows: Mapping[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """Count the tokens, n."""
        return len(self.input_ids)


class Complete(Exception):
    """All keys and values of a prefill are there; what its last layer would do with them, nobody asks for."""


class Capture(DynamicCache):  # type: ignore[misc]
    """transformers' cache of one prompt, from which a prefix is made.

    Raises Complete as soon as it has the last layer's keys and values, where that has any: a question sees those of a
    prefix, and nothing that comes after them. Not so with `to_the_end`.
    """

    def __init__(self, config: Any, *, to_the_end: bool = False) -> None:
        super().__init__(config=config)
        last = len(self.layers) - 1
        self._last = None if to_the_end or isinstance(self.layers[last], LinearAttentionLayer) else last

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **more: Any) -> Any:
        """Keep one layer's, [1, K, n, D], and hand them on."""
        kept = super().update(keys, values, layer_idx, *args, **more)
        if layer_idx == self._last:
            raise Complete
        return kept

    def prefix(self, input_ids: Sequence[int], next_position: int) -> Prefix:
        """Give what was kept of the prompt's only row."""
        none = torch.empty(0)
        kept = [(none, none) if _is_recurrent(one) else (one.keys[0], one.values[0]) for one in self.layers]
        return Prefix(
            tuple(input_ids),
            tuple(keys.contiguous() for keys, _ in kept),
            tuple(values.contiguous() for _, values in kept),
            next_position,
            {number: one for number, one in enumerate(self.layers) if _is_recurrent(one)},
            {n: one.sliding_window for n, one in enumerate(self.layers) if isinstance(one, DynamicSlidingWindowLayer)},
        )


def _is_recurrent(layer: Any) -> bool:
    return isinstance(layer, LinearAttentionLayer)


class SuffixLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of a batch's own tokens in one layer with attention, [B, K, s, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: torch.Tensor | None = None  # [B, K, capacity, D]
        self.values: torch.Tensor | None = None
        self.length = 0  # s

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens, [B, K, q, D]; gives all of the suffixes."""
        before, self.length = self.length, self.length + keys.shape[2]
        self.keys, self.values = self._with(self.keys, keys, before), self._with(self.values, values, before)
        self.is_initialized = True
        return self.own

    def _with(self, cached: torch.Tensor | None, new: torch.Tensor, before: int) -> torch.Tensor:
        if cached is None or cached.shape[2] < self.length:
            grown = new.new_empty(*new.shape[:2], self.length + GROWTH, new.shape[3])
            if cached is not None:
                grown[:, :, :before] = cached[:, :, :before]
            cached = grown
        cached[:, :, before : self.length] = new
        return cached

    @property
    def own(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the tokens so far."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        """Count the suffix tokens so far."""
        return self.length


class SuffixCache(Cache):  # type: ignore[misc]
    """The questions of one batch: rows behind their prefixes, and what is kept of their own tokens.

    `padding` is how many tokens each row is padded with on the left, so that the newest token of every row stands in
    the last column. Recurrent layers take no padding. Rows behind the same prefix should be neighbours. `laid_out` is
    what other batches behind these prefixes have made of them already, see `Step`.
    """

    def __init__(self, prefixes: Sequence[Prefix], padding: Sequence[int], laid_out: LaidOut | None = None) -> None:
        first = prefixes[0]
        super().__init__(
            layers=[
                stacked([one.states[number] for one in prefixes]) if number in first.states else SuffixLayer()
                for number in range(len(first.keys))
            ]
        )
        self._begin(prefixes, padding, {} if laid_out is None else laid_out)
        assert not (first.states and any(padding)), "padding would be taken into a recurrent state"

    def _begin(self, prefixes: Sequence[Prefix], padding: Sequence[int], laid_out: LaidOut) -> None:
        self.prefixes = list(prefixes)
        self.padding = list(padding)
        self.groups = _groups(self.prefixes)
        self.packing: Packing | None = None  # of the forward pass in progress
        self._laid_out = laid_out

    @contextmanager
    def packed(self, packing: Packing) -> Iterator[None]:
        """Take new tokens packed."""
        self.packing = packing
        try:
            yield
        finally:
            self.packing = None

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens of a layer, [B, K, q, D] or packed [1, K, T, D]; gives all of the suffixes."""
        if self.packing is not None:
            keys, values = self.packing.rows(keys), self.packing.rows(values)
        both: tuple[torch.Tensor, torch.Tensor] = super().update(keys, values, layer_idx, *args, **more)
        return both

    @property
    def length(self) -> int:
        """Count the columns of the suffixes so far, s."""
        return next((one.length for one in self.layers if isinstance(one, SuffixLayer)), 0)

    def step(
        self,
        new: int,
        device: torch.device,
        seen: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> Step:
        """Say what attention has to know of a forward pass of `new` more tokens a row.

        `seen` and `places` are given where a row is not simply text, of which each token sees those before it.
        """
        windows = self.prefixes[0].windows
        if windows and places is None:
            places = torch.arange(self.length + new, device=device) - torch.tensor(self.padding, device=device)[:, None]
            places = places.clamp(min=0)
        seen = self.seen(new, device) if seen is None else seen
        return Step(self.groups, seen, places, windows, self.packing, self._laid_out)

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
        needed = {id(prefix) for prefix in self.prefixes}
        self._laid_out = {key: made for key, made in self._laid_out.items() if key[0] in needed}
        self.reorder_cache(torch.tensor(list(rows)))

    def behind(self, prefix: Prefix, input_ids: Sequence[int], next_position: int) -> Prefix:
        """Join `prefix` and the tokens of the only row into one longer prefix."""
        keys, values = list(prefix.keys), list(prefix.values)
        for number, one in enumerate(self.layers):
            if isinstance(one, SuffixLayer):
                kept = slice(1 - prefix.windows[number], None) if number in prefix.windows else slice(None)
                keys[number] = torch.cat([keys[number], one.own[0][0]], 1)[:, kept].contiguous()
                values[number] = torch.cat([values[number], one.own[1][0]], 1)[:, kept].contiguous()
        states = {number: self.layers[number] for number in prefix.states}
        longer = prefix.input_ids + tuple(input_ids)
        return Prefix(longer, tuple(keys), tuple(values), next_position, states, prefix.windows)


def joined(batches: Sequence[SuffixCache]) -> SuffixCache:
    """Put the rows of several batches one below the other: keys and values left-padded, states side by side."""
    longest = max(batch.length for batch in batches)
    whole = SuffixCache.__new__(SuffixCache)
    Cache.__init__(
        whole, layers=[_joined_layer([b.layers[n] for b in batches], longest) for n in range(len(batches[0]))]
    )
    whole._begin(
        [prefix for batch in batches for prefix in batch.prefixes],
        [longest - batch.length + pad for batch in batches for pad in batch.padding],
        {key: made for batch in batches for key, made in batch._laid_out.items()},
    )
    return whole


def _joined_layer(layers: Sequence[Any], longest: int) -> Any:
    if _is_recurrent(layers[0]):
        return stacked(layers)
    layer = SuffixLayer()
    padded = [
        [torch.nn.functional.pad(tensor, (0, 0, longest - one.length, 0)) for tensor in one.own] for one in layers
    ]
    layer.update(torch.cat([keys for keys, _ in padded]), torch.cat([values for _, values in padded]))
    return layer


def stacked(layers: Sequence[LinearAttentionLayer]) -> LinearAttentionLayer:
    """Give one recurrent layer with the rows of all `layers`, in memory of its own: states are changed in place."""
    first = layers[0]
    whole = copy.copy(first)
    for name in ("conv_states", "recurrent_states"):
        states = getattr(first, name)
        held = {
            number: [getattr(one, name)[number] for one in layers] for number in states if states[number] is not None
        }
        setattr(whole, name, states | {number: torch.cat(rows) for number, rows in held.items()})
    return whole


class PrefixCache:
    """The last prefixes, kept for the next question; at most `tokens` of them, the longest unused go first."""

    def __init__(self, tokens: int) -> None:
        self._most = tokens
        self._cached: OrderedDict[Hashable, Beginning] = OrderedDict()

    def get(self, key: Hashable) -> Beginning | None:
        """Give the prefix cached under `key`, which is now the last used."""
        if key in self._cached:
            self._cached.move_to_end(key)
        return self._cached.get(key)

    def put(self, key: Hashable, prefix: Beginning) -> None:
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
