"""A prefix that is computed once and copied for every question behind it, in transformers' own cache.

For decoders that look at their cache in ways of their own: an index that chooses what is attended to, n-grams of the
tokens before. Nothing is padded, while decoding neither: questions behind one prefix whose suffixes have one length run
together, the others beside them. Copies take memory: no more rows at once than `COPIED_TOKENS` have room for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvsplit.models.asking import (
    Choices,
    PrefixedQuestion,
    RowLogs,
    choice_rows,
    choice_sums,
    choices_with_rows,
    grow,
    row_logs,
)

if TYPE_CHECKING:
    import torch

    from qvsplit.models.decoding import GrowingAnswer
    from qvsplit.models.forward import Forward
    from qvsplit.models.prefix_cache import Beginning
    from qvsplit.models.prompt import Prompt
    from qvsplit.store.features import Features

COPIED_TOKENS = {"cpu": 1 << 14, "cuda": 1 << 17}  # of all rows at once, prefixes included


@dataclass(frozen=True)
class CachedPrefix:
    """A prompt's beginning in transformers' cache, one row; `next_position` is that of a text token right behind."""

    input_ids: tuple[int, ...]
    cache: Any
    next_position: int

    def __len__(self) -> int:
        """Count the tokens."""
        return len(self.input_ids)

    def rows(self, number: int) -> Any:
        """Give a copy of the cache with that many rows."""
        import torch

        copied = copy.deepcopy(self.cache)
        copied.reorder_cache(torch.zeros(number, dtype=torch.long))
        return copied


class CopiedPrefix:
    """The way of models whose cache transformers can copy, see `ways.py`."""

    name = "copy its prefix"

    def __init__(self, forward: Forward, stops: Callable[[], Sequence[int]], *, can_extend: bool) -> None:
        self._forward = forward
        self._stops = stops
        self.can_extend = can_extend  # whether further items can be computed behind a beginning

    def prefill(self, prompt: Prompt, features: Sequence[Features], after: Beginning | None) -> CachedPrefix:
        """Compute the prompt up to its last item into a cache of one row."""
        from transformers import DynamicCache

        known, first, cache = 0, 0, None
        if after is not None:
            before = _cached(after)
            known, first, cache = len(before), before.next_position, before.rows(1)
        cache = DynamicCache(config=self._forward.config) if cache is None else cache
        following = self._forward.prefill(prompt, features, cache, known=known, first=first)
        return CachedPrefix(tuple(prompt.input_ids[: prompt.prefix_tokens]), cache, following)

    def generate(
        self,
        questions: Sequence[PrefixedQuestion],
        answers: Sequence[GrowingAnswer],
        is_cancelled: Callable[[], bool],
    ) -> None:
        """Let as many answers grow together as have room."""
        for part in self._parts(questions):
            batch = CopiedBatch(self._forward, [questions[number] for number in part])
            grow(batch, [answers[number] for number in part], is_cancelled)

    def score(self, questions: Sequence[PrefixedQuestion], choices: Choices) -> list[list[float] | None]:
        """Score choices, each in a row of its own."""
        with_rows = choices_with_rows(choices)
        rows = choice_rows(questions, with_rows)
        each = [tokens for mine in with_rows for tokens in mine]
        logs: dict[int, RowLogs | None] = {}
        for part in self._parts(rows):
            for group in _groups([rows[number] for number in part]):
                _, hidden = _ask(self._forward, [rows[part[place]] for place in group])
                for row, place in enumerate(group):
                    number = part[place]
                    scores = self._forward.scores(hidden[row, -len(each[number]) - 1 :])
                    logs[number] = row_logs(scores, each[number], self._stops())
        return choice_sums([logs[number] for number in range(len(rows))], choices)

    def _parts(self, questions: Sequence[PrefixedQuestion]) -> Iterator[list[int]]:
        """Cut the questions' numbers into parts that have room together."""
        room = COPIED_TOKENS.get(self._forward.device.type, COPIED_TOKENS["cpu"])
        part: list[int] = []
        taken = 0
        for number, one in enumerate(questions):
            tokens = len(one.prefix) + len(one.suffix)
            if part and taken + tokens > room:
                yield part
                part, taken = [], 0
            part.append(number)
            taken += tokens
        yield part

    def tokens(self, questions: Sequence[PrefixedQuestion]) -> int:
        """Count every row with its prefix."""
        return max(
            sum(len(questions[n].prefix) + len(questions[n].suffix) for n in part) for part in self._parts(questions)
        )


class CopiedBatch:
    """Questions behind copies of their prefixes: groups without padding, which take their steps one after the other."""

    def __init__(self, forward: Forward, questions: Sequence[PrefixedQuestion]) -> None:
        import torch

        self._forward = forward
        self._groups: list[_Group] = []
        scores: dict[int, torch.Tensor] = {}
        for group in _groups(questions):
            asked = [questions[number] for number in group]
            cache, hidden = _ask(forward, asked)
            following = _cached(asked[0].prefix).next_position + len(asked[0].suffix)
            self._groups.append(_Group(cache, group, following))
            scores |= dict(zip(group, forward.scores(hidden[:, -1]), strict=True))
        self.scores = torch.stack([scores[row] for row in range(len(questions))])

    def next(self, tokens: Sequence[int]) -> None:
        """Run each row's newest token."""
        import torch

        device = self._forward.device
        scores: dict[int, torch.Tensor] = {}
        for group in self._groups:
            ids = torch.tensor([[tokens[row]] for row in group.rows], device=device)
            places = torch.full_like(ids, group.following)
            hidden = self._forward.hidden(ids, places, group.cache)
            group.following += 1
            scores |= dict(zip(group.rows, self._forward.scores(hidden[:, -1]), strict=True))
        self.scores = torch.stack([scores[row] for row in range(len(tokens))])

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        import torch

        new = {row: number for number, row in enumerate(rows)}
        for group in self._groups:
            left = [place for place, row in enumerate(group.rows) if row in new]
            if left and len(left) < len(group.rows):
                group.cache.reorder_cache(torch.tensor(left))
            group.rows = [new[group.rows[place]] for place in left]
        self._groups = [group for group in self._groups if group.rows]


@dataclass
class _Group:
    """Rows of a batch in one cache; `following` is the position of their next token."""

    cache: Any
    rows: list[int]
    following: int


def _ask(forward: Forward, questions: Sequence[PrefixedQuestion]) -> tuple[Any, torch.Tensor]:
    """Run suffixes of one length behind copies of one prefix; gives the copies, and hidden states [B, q, width]."""
    import torch

    prefix = _cached(questions[0].prefix)
    ids = torch.tensor([list(one.suffix) for one in questions], device=forward.device)
    positions = torch.arange(ids.shape[1], device=forward.device) + prefix.next_position
    cache = prefix.rows(len(questions))
    return cache, forward.hidden(ids, positions.expand_as(ids), cache)


def _groups(questions: Sequence[PrefixedQuestion]) -> list[list[int]]:
    """Sort the numbers of questions by prefix and length of suffix."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number, one in enumerate(questions):
        groups.setdefault((id(one.prefix), len(one.suffix)), []).append(number)
    return list(groups.values())


def _cached(beginning: Beginning) -> CachedPrefix:
    assert isinstance(beginning, CachedPrefix)
    return beginning
