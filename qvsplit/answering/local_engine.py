"""The Engine on this machine: transformers' language model behind shared prefixes.

A prompt up to its last item is computed once, as a prefix; the questions behind it, and those behind other prefixes,
share batches up to a budget of tokens. The last prefixes stay cached for the next call. Where memory does not suffice
for a batch it is halved. What is wrong with one request, or with the features it names, is that request's error; what
is wrong with the model, and so with every request, ends the call.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from qvsplit.answering.batches import PrefixKey, PreparedRequest, of_one_kind, within_budget, within_context
from qvsplit.answering.engine import Completion, FeatureRef, Request
from qvsplit.errors import ModelError, OutOfMemory, QvsplitError, RequestError, UsageError, some_of
from qvsplit.models.prompt import Placeholder

if TYPE_CHECKING:
    from qvsplit.models.asking import PrefixedQuestion
    from qvsplit.models.decoding import Constraint, Decoding
    from qvsplit.models.language import LanguageModel
    from qvsplit.models.prefix_cache import Beginning, PrefixCache
    from qvsplit.models.prompt import Prompt
    from qvsplit.models.reasoning import ReasoningMarks
    from qvsplit.store.features import Features
    from qvsplit.store.row import Row

# In one batch, an item's once: on a CPU 0.9 GB on a 2B in float32, and as much again where prefixes are laid out
TOKEN_BUDGET = {"cpu": 1 << 14, "cuda": 1 << 17}
PREFIX_CACHE_TOKENS = {"cpu": 1 << 14, "cuda": 1 << 17}

Prefixes = dict[PrefixKey, "Beginning | QvsplitError"]
OnText = Callable[[str, str], None]


class FeatureReader(Protocol):
    """Where the engine gets what requests name."""

    def row(self, ref: FeatureRef) -> Row:
        """Give the row: placeholder, grid, token count. QvsplitError if there is none."""

    def features(self, ref: FeatureRef) -> Features:
        """Give the checked features. QvsplitError if there are none, or not those that were written."""


@dataclass(frozen=True)
class EngineLimits:
    """What may be in memory, in tokens of KV cache; None is the device's default, 0 of the cache none."""

    token_budget: int | None = None  # of one batch
    prefix_cache_tokens: int | None = None  # of prefixes that are kept for the next call


@dataclass
class _Model:
    """The language model of one or several engines."""

    load: Callable[[], LanguageModel]
    loaded: LanguageModel | None = None


class LocalEngine:
    """Answers requests with a language model in this process, about the features of one reader.

    One call of `answer` at a time, of all engines over the same model.

    Attributes:
        reader: Where it gets what requests name.
    """

    def __init__(
        self, load: Callable[[], LanguageModel], reader: FeatureReader, limits: EngineLimits | None = None
    ) -> None:
        self._model = _Model(load)
        self.reader = reader
        self._limits = limits or EngineLimits()
        self._cancelled = threading.Event()
        self._constraints: dict[str, Callable[[], Constraint]] = {}  # by the schema they follow

    @property
    def language(self) -> LanguageModel:
        """The language model, loaded when it is first needed."""
        if self._model.loaded is None:
            self._model.loaded = self._model.load()
        return self._model.loaded

    @property
    def is_loaded(self) -> bool:
        """Whether the language model is in memory."""
        return self._model.loaded is not None

    def over(self, reader: FeatureReader) -> LocalEngine:
        """Give an engine about other features with the same language model, which is loaded once, and nothing else.

        The same content may have other features there, so no prefix of this engine's is used.
        """
        other = LocalEngine(self._model.load, reader, self._limits)
        other._model = self._model
        return other

    @cached_property
    def prefix_cache(self) -> PrefixCache:
        """The prefixes that are kept between calls."""
        from qvsplit.models.prefix_cache import PrefixCache

        tokens = self._limits.prefix_cache_tokens
        return PrefixCache(PREFIX_CACHE_TOKENS[self.language.device.type] if tokens is None else tokens)

    @cached_property
    def marks(self) -> ReasoningMarks:
        """The marks around the model's reasoning."""
        from qvsplit.models.reasoning import ReasoningMarks

        return ReasoningMarks.of(self.language.prompter.tokenizer)

    @property
    def context(self) -> int | None:
        """How many tokens a prompt and its answer may have together; None where the model names no limit."""
        return getattr(self.language.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def token_budget(self) -> int:
        """How many tokens may be in memory for one batch."""
        budget = self._limits.token_budget
        return TOKEN_BUDGET[self.language.device.type] if budget is None else budget

    def answer(self, requests: Iterable[Request], *, on_text: OnText | None = None) -> Iterator[Completion]:
        """Give one completion for each request, batch by batch. See `Engine.answer`."""
        self._cancelled.clear()
        refused: list[Completion] = []  # while a part is put together
        prefixes: Prefixes = {}
        for part in within_budget(self._prepared(requests, refused), self.token_budget):
            yield from refused
            refused.clear()
            needed = {one.prefix_key for one in part}
            prefixes = {key: prefix for key, prefix in prefixes.items() if key in needed}
            for batch in of_one_kind(part):
                if not batch[0].choices:
                    self._constraint(batch[0].request.decoding)  # one that cannot be followed is no request's own error
                yield from self._answer_batch(batch, prefixes, on_text)
                if self._cancelled.is_set():
                    return
        yield from refused

    def cancel(self) -> None:
        """End the call of `answer` in progress before its next token. See `Engine.cancel`."""
        self._cancelled.set()

    # ------------------------------------------------------------------------------------------------------- prompts

    def _prepared(self, requests: Iterable[Request], refused: list[Completion]) -> Iterator[PreparedRequest]:
        for request in requests:
            try:
                yield self._prepare(request)
            except QvsplitError as error:
                refused.append(_failed(request, _its_own(error)))

    def _prepare(self, request: Request) -> PreparedRequest:
        """Give the request with its prompt.

        Raises:
            UsageError: The prompt is longer than the model's context, or the model cannot tell the choices apart.
        """
        prompter = self.language.prompter
        placeholders = [Placeholder.from_row(self.reader.row(ref)) for ref in request.features]
        prompt = prompter.chat(request.messages, placeholders, thinking=request.thinking)
        scored = _scored(request, prompter.text_tokens)
        prepared = PreparedRequest(request, prompt, tuple(scored), tuple(scored.values()))
        return prepared if self.context is None else within_context(prepared, self.context)

    # ------------------------------------------------------------------------------------------------------- batches

    def _answer_batch(
        self, batch: Sequence[PreparedRequest], prefixes: Prefixes, on_text: OnText | None
    ) -> list[Completion]:
        """Answer one batch: where memory does not suffice for all of it, in halves.

        `prefixes` are those at hand; those that are computed are added.
        """
        others = bool(prefixes) or len(self.prefix_cache) > 0
        try:
            return self._answer_whole(batch, prefixes, on_text)
        except OutOfMemory as error:
            if len(batch) == 1 and not others:
                return [_failed(batch[0].request, error, batch[0].prompt)]
            self._make_room(prefixes)
        except QvsplitError as error:
            own = _its_own(error)
            if len(batch) == 1:
                return [_failed(batch[0].request, own, batch[0].prompt)]
        if len(batch) == 1:
            return self._answer_batch(batch, prefixes, on_text)
        middle = len(batch) // 2
        return [
            *self._answer_batch(batch[:middle], prefixes, on_text),
            *self._answer_batch(batch[middle:], prefixes, on_text),
        ]

    def _make_room(self, prefixes: Prefixes) -> None:
        from qvsplit.runtime.devices import empty_cache

        prefixes.clear()
        self.prefix_cache.clear()
        empty_cache()

    def _answer_whole(
        self, batch: Sequence[PreparedRequest], prefixes: Prefixes, on_text: OnText | None
    ) -> list[Completion]:
        """Answer one batch at once. OutOfMemory where that does not fit."""
        from qvsplit.models.asking import PrefixedQuestion

        questions: list[PrefixedQuestion] = []
        ready: list[PreparedRequest] = []
        completions: list[Completion] = []
        for one in batch:
            if one.prefix_key not in prefixes:
                prefixes[one.prefix_key] = self._prefix_or_error(one)
            prefix = prefixes[one.prefix_key]
            if isinstance(prefix, QvsplitError):
                completions.append(_failed(one.request, prefix, one.prompt))
            else:
                ready.append(one)
                questions.append(PrefixedQuestion.of(one.prompt, prefix, one.request.seed))
        if ready:
            answer = self._score if ready[0].choices else self._generate
            completions += answer(ready, questions, on_text)
        return completions

    def _score(
        self, batch: Sequence[PreparedRequest], questions: Sequence[PrefixedQuestion], on_text: OnText | None
    ) -> list[Completion]:
        scores = self.language.score(questions, [one.choices for one in batch])
        return [
            _failed(one.request, mine, one.prompt)
            if isinstance(mine, QvsplitError)
            else Completion(
                one.request.id, prompt_tokens=len(one.prompt.input_ids), finish_reason="scored",
                logprobs=dict(zip(one.texts, mine, strict=True)),
            )
            for one, mine in zip(batch, scores, strict=True)
        ]  # fmt: skip

    def _generate(
        self, batch: Sequence[PreparedRequest], questions: Sequence[PrefixedQuestion], on_text: OnText | None
    ) -> list[Completion]:
        from qvsplit.models.language import GenerateOptions

        decoding = replace(batch[0].request.decoding, marks=self.marks)
        options = GenerateOptions(
            constraint=self._constraint(decoding),
            on_text=(lambda number, text: on_text(batch[number].request.id, text)) if on_text else None,
            is_cancelled=self._cancelled.is_set,
        )
        return [
            Completion(
                one.request.id, done.text, tuple(done.tokens), len(one.prompt.input_ids), done.finish_reason,
                error=done.error, reasoning=done.reasoning,
            )
            for one, done in zip(batch, self.language.generate(questions, decoding, options), strict=True)
        ]  # fmt: skip

    def _constraint(self, decoding: Decoding) -> Callable[[], Constraint] | None:
        """Compile the schema that answers must conform to, once."""
        from qvsplit.answering.schema import compiler

        if decoding.json_schema is None:
            return None
        key = json.dumps(decoding.json_schema)  # the order of a schema's fields is the order of the answer's
        if key not in self._constraints:
            language = self.language
            self._constraints[key] = compiler(decoding.json_schema, language.prompter.tokenizer, language.stops)
        return self._constraints[key]

    # ------------------------------------------------------------------------------------------------------ prefixes

    def _prefix_or_error(self, one: PreparedRequest) -> Beginning | QvsplitError:
        """Give the request's prefix, or why it has none: features that are damaged, say. OutOfMemory is raised."""
        try:
            return self._prefix(one.prompt, one.request.features, one.request.shared)
        except OutOfMemory:
            raise
        except QvsplitError as error:
            return _its_own(error)

    def _prefix(self, prompt: Prompt, features: tuple[FeatureRef, ...], shared: int = 0) -> Beginning:
        """Give the prefix of these features: a cached one, one behind a shared beginning, or a new one."""
        key = (features, tuple(prompt.input_ids[: prompt.prefix_tokens]))
        cached = self.prefix_cache.get(key)
        if cached is not None:
            return cached
        shares = 0 < shared < len(features) and self.language.can_extend and prompt.begins_with(shared)
        after = self._prefix(prompt.upto(shared), features[:shared]) if shares else None
        new = [self.reader.features(ref) for ref in features[shared if shares else 0 :]]
        prefix = self.language.prefill(prompt, new, after=after)
        self.prefix_cache.put(key, prefix)
        return prefix


def _scored(request: Request, tokens_of: Callable[[str], list[int]]) -> dict[str, tuple[int, ...]]:
    """Give the tokens of what is scored, by its text. UsageError if the model cannot tell two of the choices apart."""
    scored = {choice: tuple(tokens_of(choice)) for choice in request.choices}
    known = set(scored.values())
    if not all(known) or len(known) < len(request.choices):
        raise UsageError(f"to this model two of the choices {some_of(request.choices)} are the same, or one is nothing")
    for form in request.forms:
        tokens = tuple(tokens_of(form))
        if tokens and tokens not in known:
            known.add(tokens)
            scored[form] = tokens
    return scored


def _its_own(error: QvsplitError) -> QvsplitError:
    """Give an error of one request's. What is wrong with the model is wrong with all of them, and raised."""
    if isinstance(error, ModelError) and not isinstance(error, OutOfMemory | RequestError):
        raise error
    return error


def _failed(request: Request, error: QvsplitError, prompt: Prompt | None = None) -> Completion:
    tokens = len(prompt.input_ids) if prompt is not None else 0
    return Completion(request.id, prompt_tokens=tokens, finish_reason="error", error=error)
