"""Requests with their prompts, and how many of them fit into memory together. Knows nothing of models."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from qvsplit.answering.engine import FeatureRef, Request
from qvsplit.errors import UsageError
from qvsplit.models.prompt import Prompt

PrefixKey = tuple[tuple[FeatureRef, ...], tuple[int, ...]]


# How to extract an item that takes too many tokens of a prompt, by its kind
_SMALLER = {
    "image": "with a lower `max_pixels`",
    "video": "with fewer frames (`fps`, `max_frames`) or tokens (`video_max_tokens`), or in parts (`clip_seconds`)",
}


@dataclass(frozen=True)
class PreparedRequest:
    """A request, its prompt, and what is scored: texts, and the tokens of each."""

    request: Request
    prompt: Prompt
    texts: tuple[str, ...] = ()
    choices: tuple[tuple[int, ...], ...] = ()

    @cached_property
    def prefix_key(self) -> PrefixKey:
        """What names the prompt's beginning up to its last item.

        The tokens too: a template may put text before the items, and then every question has its own prefix.
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


def within_context(one: PreparedRequest, context: int) -> PreparedRequest:
    """Give the request, with no more room for its answer than is left of the model's context behind the prompt.

    Raises:
        UsageError: The prompt leaves no room for an answer.
    """
    tokens = len(one.prompt.input_ids)
    least = max(map(len, one.choices), default=1)
    if tokens + least > context:
        raise UsageError(_too_long(one.prompt, context - least, context))
    decoding = one.request.decoding
    if one.choices or tokens + decoding.max_new_tokens <= context:
        return one
    return replace(one, request=replace(one.request, decoding=replace(decoding, max_new_tokens=context - tokens)))


def _too_long(prompt: Prompt, most: int, context: int) -> str:
    """Say how long the prompt is, how long it may be, and what to do."""
    tokens, items = len(prompt.input_ids), len(prompt.placeholders)
    shown = prompt.prefix_tokens if items else 0
    question = tokens - shown
    lengths = f"the prompt has {tokens:,} tokens, and the model's context {context:,}, the answer included"
    if question > shown:
        return f"{lengths}; ask a shorter question: this one takes {question:,}"
    if items == 1:
        one = prompt.placeholders[0]
        return f"{lengths}; {one.name} takes {shown:,}: extract it {_SMALLER[one.kind]}"
    fitting = bisect_right(range(1, items), most - question, key=lambda number: len(prompt.upto(number).input_ids))
    kinds = {one.kind for one in prompt.placeholders}
    what = f"{kinds.pop()}s" if len(kinds) == 1 else "images and videos"
    return f"{lengths}; {fitting:,} of its {items:,} {what} would fit: ask about fewer together"


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
