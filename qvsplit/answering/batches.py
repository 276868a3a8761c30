"""Requests with their prompts, and how many of them fit into memory together. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from qvsplit.answering.engine import FeatureRef, Request
from qvsplit.models.prompt import Prompt

PrefixKey = tuple[tuple[FeatureRef, ...], tuple[int, ...]]


@dataclass(frozen=True)
class PreparedRequest:
    """A request, its prompt, and the tokens of each of its choices."""

    request: Request
    prompt: Prompt
    choices: tuple[tuple[int, ...], ...] = ()

    @cached_property
    def prefix_key(self) -> PrefixKey:
        """What names the prompt's beginning up to its last item.

        The tokens too: a template may put text before the images, and then every question has its own prefix.
        """
        return self.request.features, tuple(self.prompt.input_ids[: self.prompt.prefix_tokens])

    @cached_property
    def suffix(self) -> list[int]:
        """The tokens behind the prefix: the question."""
        return self.prompt.input_ids[self.prompt.prefix_tokens :]

    @property
    def suffix_tokens(self) -> int:
        """How many tokens stand behind the prefix: the question, and the choices."""
        return len(self.suffix) + sum(map(len, self.choices))

    @property
    def room(self) -> int:
        """How many tokens the answer may come to."""
        return 0 if self.choices else self.request.decoding.max_new_tokens


def within_budget(prepared: Iterable[PreparedRequest], token_budget: int) -> Iterator[list[PreparedRequest]]:
    """Cut requests, in their order, into parts whose tokens fit into memory together.

    What counts: the suffixes, padded to the longest, room for the answers, and every prefix but the first, without
    which nothing could be asked at all.
    """
    part: list[PreparedRequest] = []
    prefixes: dict[PrefixKey, int] = {}
    longest = 0
    for one in prepared:
        more = prefixes | {one.prefix_key: one.prompt.prefix_tokens}
        longest = max(longest, one.suffix_tokens + one.room)
        others = sum(more.values()) - next(iter(more.values()))
        if part and others + (len(part) + 1) * longest > token_budget:
            yield part
            part, more, longest = [], {one.prefix_key: one.prompt.prefix_tokens}, one.suffix_tokens + one.room
        part.append(one)
        prefixes = more
    if part:
        yield part


def of_one_kind(prepared: Sequence[PreparedRequest]) -> list[list[PreparedRequest]]:
    """Part what is scored from what is generated, and what is generated in different ways; each keeps its order."""
    batches: list[list[PreparedRequest]] = []
    for one in prepared:
        mine = next((batch for batch in batches if _are_alike(batch[0], one)), None)
        if mine is None:
            batches.append([one])
        else:
            mine.append(one)
    return batches


def _are_alike(one: PreparedRequest, other: PreparedRequest) -> bool:
    if one.choices or other.choices:
        return bool(one.choices) and bool(other.choices)
    return one.request.decoding == other.request.decoding
