"""Attention of many questions behind few prefixes, without copying a prefix for any of them.

Queries of all questions behind one prefix meet its keys in one matrix product, then their own suffix's keys, under one
softmax. That is the same sum as over the joined sequence, in another order (shared-prefix or cascade attention:
Hydragen, arXiv 2402.05099).

Which questions stand behind which prefix, and who sees what, is in the `Step` that is in force (`in_force`); what the
model makes of masks is then not looked at. With none in force, attention and masks are transformers' own SDPA.

Shapes: B questions, H query heads on K key heads (G = H / K), q new tokens, s suffix tokens so far, n prefix tokens,
D values a head. Knows nothing of caches or models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qvsplit.errors import ModelError

ATTENTION = "qvsplit_shared_prefix"  # what transformers knows `attention` and `mask` by
SCORE_VALUES = 2 << 20  # attention scores computed at once: they stay in a CPU's cache
# what models hand to every attention function, and SDPA does not look at either; windows are in masks, or in the step
UNUSED = frozenset({
    "position_ids", "cache_position", "use_cache", "return_dict", "output_hidden_states", "sliding_window", "is_causal",
})  # fmt: skip


class KeysAndValues(Protocol):
    """A prefix's keys and values, [K, n, D], by layer. Of a layer with a window, the last that it can see."""

    @property
    def keys(self) -> Sequence[torch.Tensor]:
        """Keys, one tensor a layer."""

    @property
    def values(self) -> Sequence[torch.Tensor]:
        """Values, one tensor a layer."""


@dataclass(frozen=True)
class Step:
    """What attention has to know of one forward pass.

    Attributes:
        groups: Runs of rows behind the same prefix: (prefix, first row, row after the last).
        seen: What of its suffix each new token sees, bool [B, q, s]; None where all.
        places: How many text tokens stand between a row's prefix and each token of its suffix, int64 [B, s]; padding's
            is 0. Needed where there are windows.
        windows: The layers with sliding windows: how many tokens a token sees of those up to itself.
    """

    groups: Sequence[tuple[KeysAndValues, int, int]]
    seen: torch.Tensor | None = None
    places: torch.Tensor | None = None
    windows: Mapping[int, int] = field(default_factory=dict)


_STEP: ContextVar[Step | None] = ContextVar("step", default=None)


@contextmanager
def in_force(step: Step | None) -> Iterator[None]:
    """Let attention go by `step`; by none, it is SDPA."""
    before = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(before)


def mask(*args: Any, **given: Any) -> torch.Tensor | None:
    """Make the mask that transformers asks for: none where a step is in force, which has its own."""
    made: torch.Tensor | None = None if _STEP.get() is not None else sdpa_mask(*args, **given)
    return made


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers asks for it: query [B, H, q, D], key and value [B, K, s, D] → [B, q, H, D].

    With a step in force, key and value are the suffixes' own, and every row sees its prefix before them.

    Raises:
        ModelError: The model asks for more than this computes: capped scores, attention sinks.
    """
    _refuse_unknown(module, others)
    step = _STEP.get()
    if step is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
        return output, None
    layer = module.layer_idx
    window = step.windows.get(layer)
    rows, heads, new, width = query.shape
    output = torch.empty(rows, new, heads, width, dtype=query.dtype, device=query.device)
    for prefix, first, end in step.groups:
        keys, values = prefix.keys[layer].float(), prefix.values[layer].float()
        own_keys, own_values = key[first:end].float(), value[first:end].float()
        scored = heads * (end - first) * (keys.shape[1] + key.shape[2])  # values, for one new token a row
        size = max(1, SCORE_VALUES // scored)
        for start in range(0, new, size):
            part = slice(start, start + size)
            some = query[first:end, :, part].float() * scaling
            known = key.shape[2] - new + start + some.shape[2]  # of the suffix: nobody sees what comes later
            seen = None if step.seen is None else step.seen[first:end, part, :known].to(query.device)
            of_prefix = None
            if window is not None and window < keys.shape[1] + key.shape[2]:
                assert step.places is not None
                places = step.places[first:end, :known].to(query.device)
                seen, of_prefix = _within(window, places, some.shape[2], keys.shape[1], seen)
            output[first:end, part] = _attend(
                some, keys, values, own_keys[:, :, :known], own_values[:, :, :known], seen, of_prefix
            )
    return output, None


def _refuse_unknown(module: Any, others: Mapping[str, Any]) -> None:
    """Raise where a model's attention has a feature that SDPA and this would pass over in silence."""
    for name, value in others.items():
        if name not in UNUSED and value is not None and value is not False and not (name == "dropout" and value == 0):
            raise ModelError(
                f"{type(module).__name__} wants `{name}` of its attention, which qvsplit's shared prefixes do not have"
            )


def _within(
    window: int, places: torch.Tensor, new: int, n: int, seen: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Say what a layer's window leaves of suffix and prefix: bool [b, q, s] and [b, q, n].

    The prefix's last key stands one before place 0. Tokens are as far apart as they are in the text, whatever their
    rotary positions, and padding does not count.
    """
    of_new = places[:, -new:, None]  # [b, q, 1]
    near = of_new - places[:, None] < window
    of_prefix = of_new + n - torch.arange(n, device=places.device) < window
    return near if seen is None else near & seen, of_prefix


def _attend(
    query: torch.Tensor,
    prefix_keys: torch.Tensor,
    prefix_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor | None,
    of_prefix: torch.Tensor | None = None,
) -> torch.Tensor:
    """Take one softmax over prefix and suffix: scaled query [b, H, q, D] → [b, q, H, D].

    `seen`, bool [b, q, s], and `of_prefix`, bool [b, q, n], say what is seen of either, all where they are None. All
    float32, whatever the model's dtype, as SDPA's kernels have their scores and sums.
    """
    rows, heads, new, width = query.shape
    key_heads, n, s = keys.shape[1], prefix_keys.shape[1], keys.shape[2]
    group = heads // key_heads
    folded = query.reshape(rows, key_heads, group * new, width)
    by_head = folded.transpose(0, 1).reshape(key_heads, rows * group * new, width)
    scores = torch.empty(key_heads, rows * group * new, n + s, device=query.device)
    torch.bmm(by_head, prefix_keys.transpose(1, 2), out=scores[:, :, :n])
    if of_prefix is not None:
        scores.view(key_heads, rows, group, new, n + s)[..., :n].masked_fill_(~of_prefix[:, None], float("-inf"))
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
AttentionMaskInterface.register(ATTENTION, mask)
