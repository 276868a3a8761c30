"""Attention of many questions behind few prefixes, without copying a prefix for any of them.

Each question attends to its own suffix first. Then the queries of all questions behind one prefix meet its keys in one
matrix product, and what the suffix gave takes part in the same softmax as one more key: the logarithm of its sum of
exponentials is that key's score, its output that key's value. That is the same sum as over the joined sequence, in
another order (shared-prefix or cascade attention: Hydragen, arXiv 2402.05099).

Which questions stand behind which prefix, and who sees what, is in the `Step` that is in force (`in_force`); what the
model makes of masks is then not looked at. With none in force, attention and masks are transformers' own SDPA.

Shapes: B questions, H query heads on K key heads (G = H / K), q new tokens, s suffix tokens so far, n prefix tokens,
D values a head; T tokens of all questions, B · q or, packed, fewer. Knows nothing of caches or models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qvsplit.errors import ModelError
from qvsplit.kernels.prefix_products import PlainPrefix, PrefixProducts, products

ATTENTION = "qvsplit_shared_prefix"  # what transformers knows `attention` and `mask` by
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
class Packing:
    """Tokens of several rows in one, [1, T]: no padding, and what several rows begin with only once.

    Attributes:
        columns: Which token stands where in the padded rows, int64 [B, s]; in padding, any.
        found: Where in those rows, counted through, each token stands for the first time: int64 [T].
        tokens: What each run of rows behind the same prefix has: (first token, token after the last).
    """

    columns: torch.Tensor
    found: torch.Tensor
    tokens: Sequence[tuple[int, int]]

    def rows(self, packed: torch.Tensor) -> torch.Tensor:
        """Put tokens where they stand: [1, heads, T, D] → [B, heads, s, D]."""
        rows: torch.Tensor = packed[0][:, self.columns.to(packed.device)].transpose(0, 1)
        return rows


@dataclass(frozen=True)
class Step:
    """What attention has to know of one forward pass.

    Attributes:
        groups: Runs of rows behind the same prefix: (prefix, first row, row after the last).
        seen: What of its suffix each new token sees, bool [B, q, s]; None where all.
        places: How many text tokens stand between a row's prefix and each token of its suffix, int64 [B, s]; padding's
            is 0. Needed where there are windows.
        windows: The layers with sliding windows: how many tokens a token sees of those up to itself.
        packing: Where the new tokens are, if the model is given them as one row.
        laid_out: What was made of the prefixes for these products, by prefix and layer; it outlives the step.
    """

    groups: Sequence[tuple[KeysAndValues, int, int]]
    seen: torch.Tensor | None = None
    places: torch.Tensor | None = None
    windows: Mapping[int, int] = field(default_factory=dict)
    packing: Packing | None = None
    laid_out: MutableMapping[tuple[int, int], PrefixProducts] = field(default_factory=dict)
    masks: MutableMapping[int | None, torch.Tensor | None] = field(default_factory=dict)  # made once for all layers


_STEP: ContextVar[Step | None] = ContextVar("step", default=None)


@contextmanager
def in_force(step: Step | None) -> Iterator[None]:
    """Let attention go by `step`; by none, it is SDPA."""
    before = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(before)


def is_in_force() -> bool:
    """Say whether a step is."""
    return _STEP.get() is not None


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
    layer, window = module.layer_idx, step.windows.get(module.layer_idx)
    scaled, keys, values = query.float() * scaling, key.float(), value.float()
    mask = _mask(step, window, scaled, keys)
    seen = [
        _seen_of_prefix(step, window, number, prefix.keys[layer].shape[1], query.shape[2])
        if window is not None and window < prefix.keys[layer].shape[1] + key.shape[2] else None
        for number, (prefix, _, _) in enumerate(step.groups)
    ]  # fmt: skip
    is_laid_out = any((id(prefix), layer) in step.laid_out for prefix, _, _ in step.groups)
    if query.shape[2] == 1 and step.packing is None and not is_laid_out:
        output = _attend_newest(step, layer, scaled, keys, values, mask, seen)
    else:
        output = _attend_tokens(step, layer, scaled, keys, values, mask, seen)
    return output.to(query.dtype), None


def _attend_tokens(
    step: Step,
    layer: int,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    seen: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """Attend to the suffixes, then to the prefixes, token by token of either: → [B, q, H, D]."""
    packing = step.packing
    own, own_logs = _attend_suffix(query if packing is None else packing.rows(query), keys, values, mask)
    # as tokens: [H, T, D] and [H, T]
    own, own_logs = own.transpose(0, 1).flatten(1, 2), own_logs.transpose(0, 1).flatten(1, 2)
    if packing is not None:
        found = packing.found.to(query.device)
        own, own_logs = own[:, found], own_logs[:, found]
    tokens = query.transpose(0, 1).flatten(1, 2)
    key_heads = keys.shape[1]
    parts = []
    for number, (prefix, _, _) in enumerate(step.groups):
        at = _tokens_of(step, number, query.shape[2])
        made = _laid_out(step, prefix, layer, at.stop - at.start)
        queries, logs = (one[:, at].unflatten(0, (key_heads, -1)) for one in (tokens, own_logs))
        of_prefix, weight = made.attend(queries, logs, seen[number])
        parts.append(torch.addcmul(of_prefix.flatten(0, 1), weight.flatten(0, 1), own[:, at]))
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return whole.unflatten(1, (query.shape[0], -1)).permute(1, 2, 0, 3)


def _attend_newest(
    step: Step,
    layer: int,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    seen: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """Attend to prefix and suffix together, one new token a row: → [B, 1, H, D]. In fewer operations than the other."""
    (_, heads, _, width), (_, key_heads, s, _) = query.shape, keys.shape
    group = heads // key_heads
    parts = []
    for number, (prefix, first, end) in enumerate(step.groups):
        n = prefix.keys[layer].shape[1]
        queries = query[first:end].view(-1, key_heads, group, width)
        by_head = queries.transpose(0, 1).reshape(key_heads, -1, width)
        scores = query.new_empty(key_heads, by_head.shape[1], n + s)
        torch.bmm(by_head, prefix.keys[layer].float().transpose(1, 2), out=scores[..., :n])
        own = torch.matmul(queries, keys[first:end].transpose(2, 3))  # [b, K, G, s]
        by_row = scores.view(key_heads, end - first, group, n + s)
        by_row[..., n:] = (own if mask is None else own + mask[first:end]).transpose(0, 1)
        of_prefix = seen[number]
        if of_prefix is not None:
            by_row[..., :n].masked_fill_(~of_prefix.to(scores.device)[:, None], float("-inf"))
        weights = torch.softmax(scores, -1)
        summed = torch.bmm(weights[..., :n], prefix.values[layer].float()).view(key_heads, -1, group, width)
        own_weights = weights.view(key_heads, -1, group, n + s)[..., n:].transpose(0, 1)
        total = torch.matmul(own_weights, values[first:end]) + summed.transpose(0, 1)
        parts.append(total.reshape(-1, 1, heads, width))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _tokens_of(step: Step, number: int, new: int) -> slice:
    """Say which tokens a group has, of `new` a row or packed."""
    if step.packing is not None:
        return slice(*step.packing.tokens[number])
    _, first, end = step.groups[number]
    return slice(first * new, end * new)


def _laid_out(step: Step, prefix: KeysAndValues, layer: int, tokens: int) -> PrefixProducts:
    """Give the products with a prefix, made once for all steps of a batch where that is worth it."""
    known = (id(prefix), layer)
    if known not in step.laid_out:
        made = products(prefix.keys[layer], prefix.values[layer], tokens)
        if isinstance(made, PlainPrefix):  # nothing that need be kept
            return made
        step.laid_out[known] = made
    return step.laid_out[known]


def _refuse_unknown(module: Any, others: Mapping[str, Any]) -> None:
    """Raise where a model's attention has a feature that SDPA and this would pass over in silence."""
    for name, value in others.items():
        if name not in UNUSED and value is not None and value is not False and not (name == "dropout" and value == 0):
            raise ModelError(
                f"{type(module).__name__} wants `{name}` of its attention, which qvsplit's shared prefixes do not have"
            )


def _mask(step: Step, window: int | None, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
    """Say what of its suffix each token sees in such layers, as SDPA's kernels want it: 0 or -inf, [B, 1, q, s]."""
    if window not in step.masks:
        seen = step.seen
        if window is not None:
            assert step.places is not None
            new = query.shape[2] if step.packing is None else keys.shape[2]
            near = step.places[:, -new:, None] - step.places[:, None] < window
            seen = near if seen is None else near & seen
        made = None
        if seen is not None:
            made = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))[:, None]
        step.masks[window] = made
    kept = step.masks[window]
    return None if kept is None else kept.to(query.device)


def _seen_of_prefix(step: Step, window: int, number: int, n: int, new: int) -> torch.Tensor:
    """Say what a layer's window leaves of a group's prefix to each of its tokens: bool [tokens, n].

    The prefix's last key stands one before place 0. Tokens are as far apart as they are in the text, whatever their
    rotary positions, and padding does not count.
    """
    assert step.places is not None
    _, first, end = step.groups[number]
    if step.packing is None:
        places = step.places[first:end, -new:].flatten()
    else:
        found = step.packing.found.to(step.places.device)
        places = step.places.flatten()[found][_tokens_of(step, number, new)]
    seen: torch.Tensor = places[:, None] + n - torch.arange(n, device=places.device) < window
    return seen


def _attend_suffix(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the suffixes alone: scaled query [B, H, q, D], keys and values [B, K, s, D], all float32.

    Returns:
        The output [B, H, q, D], and the logarithm of each softmax's sum [B, H, q]. A token that sees nothing, which
        only padding is, has numbers that mean nothing.
    """
    rows, heads, new, width = query.shape
    key_heads, s = keys.shape[1], keys.shape[2]
    group = heads // key_heads
    by_head = query.reshape(rows * key_heads, group, new, width)
    keys, values = (one.flatten(0, 1)[:, None].expand(-1, group, -1, -1) for one in (keys, values))
    if mask is not None:
        mask = mask[:, None].expand(-1, key_heads, -1, -1, -1).reshape(rows * key_heads, 1, new, s)
    if new == 1:  # all queries of a key head as if they were tokens: fewer, larger products
        by_head, keys, values = by_head.transpose(1, 2), keys[:, :1], values[:, :1]
    if query.device.type == "cpu" and _FLASH is not None:
        output, logs = _FLASH(by_head, keys, values, attn_mask=mask, scale=1.0)
    else:
        scores = torch.matmul(by_head, keys.transpose(2, 3))
        if mask is not None:
            scores = scores + mask.clamp(min=torch.finfo(torch.float32).min)
        logs = torch.logsumexp(scores, -1)
        output = torch.matmul((scores - logs[..., None]).exp_(), values)
    return output.reshape(rows, heads, new, width), logs.reshape(rows, heads, new)


# gives the sums' logarithms beside the output, which SDPA itself does not
_FLASH: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)

AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, mask)
