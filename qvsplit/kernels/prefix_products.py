"""The matrix products of many queries with one prefix's keys and values, and the softmax between them.

On a CPU keys and values are laid out once for oneDNN, like a linear layer's weight: its products take a half to a third
of the time of torch's own (docs/decisions.md), and all questions and all steps of a batch share them.

Shapes: K key heads, G query heads on each, t tokens, n prefix tokens, D values a head.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from qvsplit.kernels import packed_linear

SCORE_VALUES = 1 << 20  # scores of one key head computed at once: they stay in a CPU's cache
ALIGNED = 16  # columns of scores are filled up to a multiple
LEAST_TOKENS = 64  # for fewer queries than these, laying out takes longer than it saves
MOST_PREFIX_TOKENS = 1 << 14  # a longer prefix (a long video's) is not held twice


class PrefixProducts(Protocol):
    """What attention wants of a prefix."""

    def attend(
        self, query: torch.Tensor, other: torch.Tensor, seen: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take one softmax over the prefix and one more key, whose score is given and whose value is not.

        Args:
            query: Scaled queries, float32 [K, G, t, D].
            other: The score of that key, [K, G, t].
            seen: What of the prefix each token sees, bool [t, n]; None is all.

        Returns:
            The sum over the prefix, [K, G, t, D], and the weight of the other key, [K, G, t, 1].
        """


def products(keys: torch.Tensor, values: torch.Tensor, tokens: int) -> PrefixProducts:
    """Choose for a prefix, keys and values [K, n, D], that `tokens` tokens attend to first."""
    is_worth_it = tokens >= LEAST_TOKENS and keys.shape[1] <= MOST_PREFIX_TOKENS
    if keys.device.type == "cpu" and is_worth_it and packed_linear.can_pack(torch.float32):
        return PackedPrefix(keys, values)
    return PlainPrefix(keys, values)


class PlainPrefix:
    """torch's own products. In float32, whatever the model's dtype, as SDPA's kernels have their scores and sums."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._keys, self._values = keys.float(), values.float()

    def attend(
        self, query: torch.Tensor, other: torch.Tensor, seen: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `PrefixProducts`."""
        heads, group, t, width = query.shape
        n = self._keys.shape[1]
        outputs = []
        for at in _runs(t, heads * group * (n + 1)):
            scores = query.new_empty(heads, group * (at.stop - at.start), n + 1)
            torch.bmm(query[:, :, at].reshape(heads, -1, width), self._keys.transpose(1, 2), out=scores[..., :n])
            scores[..., n] = other[:, :, at].flatten(1)
            if seen is not None:
                scores.unflatten(1, (group, -1))[..., :n].masked_fill_(~seen[at].to(scores.device), float("-inf"))
            weights = torch.softmax(scores, -1)
            summed = torch.bmm(weights[..., :n], self._values)
            outputs.append((summed.view(heads, group, -1, width), weights[..., n:].view(heads, group, -1, 1)))
        if len(outputs) == 1:
            return outputs[0]
        return torch.cat([one for one, _ in outputs], 2), torch.cat([weight for _, weight in outputs], 2)


class PackedPrefix:
    """oneDNN's, in float32. The other key has a column of the scores, behind the prefix's, and a value of zeros."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._n = keys.shape[1]
        room = -(-(self._n + 1) // ALIGNED) * ALIGNED - self._n
        filled = [torch.nn.functional.pad(one.float(), (0, 0, 0, room)) for one in (keys, values)]
        self._bias = keys.new_zeros(self._n + room, dtype=torch.float32)
        self._bias[self._n + 1 :] = float("-inf")  # columns that are there for alignment only
        pack = torch.ops.mkldnn._reorder_linear_weight
        rows = packed_linear.ROWS
        self._keys = [pack(one.contiguous(), rows) for one in filled[0]]  # [n + room, width]
        self._values = [pack(one.t().contiguous(), rows) for one in filled[1]]  # [width, n + room]

    def attend(
        self, query: torch.Tensor, other: torch.Tensor, seen: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `PrefixProducts`."""
        heads, group, t, width = query.shape
        n = self._n
        summed, weight = (
            torch.empty_like(query, memory_format=torch.contiguous_format),
            query.new_empty(heads, group, t, 1),
        )
        product: Any = torch.ops.mkldnn._linear_pointwise
        for at in _runs(t, group * len(self._bias)):
            for head in range(heads):
                rows = query[head, :, at].reshape(-1, width)
                scores = product(rows, self._keys[head], self._bias, "none", [], "")
                scores[:, n] = other[head, :, at].flatten()
                if seen is not None:
                    scores.unflatten(0, (group, -1))[..., :n].masked_fill_(~seen[at], float("-inf"))
                torch.softmax(scores, -1, out=scores)
                summed[head, :, at] = product(scores, self._values[head], None, "none", [], "").view(group, -1, width)
                weight[head, :, at, 0] = scores[:, n].view(group, -1)
        return summed, weight


def _runs(tokens: int, scores: int) -> list[slice]:
    """Cut tokens into runs that have SCORE_VALUES scores together, where each has that many."""
    size = max(1, SCORE_VALUES // scores)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
