"""Questions about rows to requests, and completions to answers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from qvsplit.answering.checks import Question, normalised, outcome
from qvsplit.answering.engine import Completion, Engine, FeatureRef, Request
from qvsplit.answering.options import AskOptions
from qvsplit.errors import QvsplitError, UsageError
from qvsplit.models.prompt import question_messages
from qvsplit.output.answer import Answer
from qvsplit.store.row import Row

SKIPPED = "skipped"  # the finish reason of a question whose `only_if` did not hold
CANCELLED = "cancelled"
ERROR = "error"


class Turn(NamedTuple):
    """A question that has been asked before, and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class PromptItems:
    """The items of one prompt, in order; the first `shared` of them begin others' prompts too.

    `earlier` is what has been said about them in the same conversation: it stands behind the items in the prompt.
    """

    rows: tuple[Row, ...]
    shared: int = 0
    earlier: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Asked:
    """The answer to one of the questions that were asked together: its place among them, and why it failed."""

    place: int
    answer: Answer
    error: QvsplitError | None = None


@dataclass(frozen=True)
class Questioner:
    """Asks an engine questions about rows.

    Attributes:
        engine: What answers.
        options: System message and decoding.
        encoder_check: What every answer says of the evidence for its features.
        check_row: Raises QvsplitError for a row without features.
    """

    engine: Engine
    options: AskOptions = field(default_factory=AskOptions)
    encoder_check: str = ""
    check_row: Callable[[Row], None] = lambda row: None

    def ask(
        self,
        pairs: Sequence[tuple[PromptItems, Question]],
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> Iterator[Asked]:
        """Ask each question about its items; gives the answers in any order. One that fails is given with its error.

        Where the engine was cancelled, the answers that it had no time for are missing.
        """
        requests: list[Request] = []
        for place, (items, question) in enumerate(pairs):
            try:
                requests.append(self._request(place, items, question))
            except QvsplitError as error:
                yield Asked(place, self.failed(items, question, str(error)), error)
        hear = None if on_text is None else lambda request, text: on_text(text)
        for completion in self.engine.answer(requests, on_text=hear) if requests else ():
            place = int(completion.id)
            yield Asked(place, self._answer(completion, *pairs[place]), completion.error)

    def skipped(self, items: PromptItems, question: Question) -> Answer:
        """Give what stands for the answer to a question whose `only_if` did not hold: nothing is flagged by it."""
        return replace(self._blank(items, question), finish_reason=SKIPPED, flagged=False if question.flag else None)

    def failed(self, items: PromptItems, question: Question, error: str) -> Answer:
        """Give what stands for the answer to a question that could not be answered."""
        return replace(self._blank(items, question), finish_reason=ERROR, error=error)

    def cancelled(self, items: PromptItems, question: Question) -> Answer:
        """Give what stands for the answer to a question that was cancelled before it was begun."""
        return replace(self._blank(items, question), finish_reason=CANCELLED)

    def _blank(self, items: PromptItems, question: Question) -> Answer:
        return Answer(
            rows=items.rows, question=question.text, id=question.id, text="", tokens=[], prompt_tokens=0,
            finish_reason="", encoder_check=self.encoder_check,
        )  # fmt: skip

    def _request(self, place: int, items: PromptItems, question: Question) -> Request:
        if not items.rows:
            raise UsageError("no image or video to ask about")
        if not question.text.strip():
            raise UsageError("an empty question")
        for row in items.rows:
            self.check_row(row)
        refs = tuple(FeatureRef(*row.content) for row in items.rows if row.content is not None)
        kinds = [row.kind for row in items.rows]
        spellings = tuple(spelling for spellings in question.spellings.values() for spelling in spellings)
        return Request(
            id=str(place),
            messages=tuple(question_messages(question.text, kinds, self.options.system, items.earlier)),
            features=refs,
            shared=items.shared,
            decoding=self.options.decoding,
            choices=spellings,
            forms=tuple(form for forms in question.forms.values() for form in forms if form not in spellings),
            seed=self._seed(refs, question, items.earlier),
        )

    def _seed(self, refs: tuple[FeatureRef, ...], question: Question, earlier: tuple[Turn, ...]) -> int:
        """Derive a seed from what is asked about what, so that an answer does not depend on its neighbours."""
        asked = [self.options.seed, refs, self.options.system, question.text]
        asked += ["thinking"] if self.options.thinking else []
        asked += [earlier] if earlier else []
        return int.from_bytes(hashlib.sha256(json.dumps(asked).encode()).digest()[:7])

    def _answer(self, completion: Completion, items: PromptItems, question: Question) -> Answer:
        blank = replace(self._blank(items, question), prompt_tokens=completion.prompt_tokens)
        if completion.error is not None:
            return replace(blank, finish_reason=ERROR, error=str(completion.error))
        if completion.logprobs is not None:
            scored = completion.logprobs
            of_forms = {
                choice: {form: scored[form] for form in forms if form in scored}
                for choice, forms in question.forms.items()
            }
            logprobs = {choice: _log_sum(list(mine.values())) for choice, mine in of_forms.items()}
            forms = {choice: max(mine, key=mine.__getitem__) for choice, mine in of_forms.items()}
            answer = replace(blank, logprobs=logprobs, forms=forms, finish_reason=completion.finish_reason)
            return judged(answer, question)
        return replace(
            blank, text=completion.text, reasoning=completion.reasoning, tokens=list(completion.tokens),
            finish_reason=completion.finish_reason,
        )  # fmt: skip


def judged(answer: Answer, question: Question) -> Answer:
    """Judge `answer` by its log-probabilities, under what `question` says now: threshold, flag, level, choice mass."""
    if answer.logprobs is None:
        return answer
    answer = replace(answer, probabilities=normalised(answer.logprobs), id=question.id)
    assert answer.probabilities is not None
    assert answer.choice_mass is not None
    found = outcome(question, answer.probabilities, answer.choice_mass)
    return replace(
        answer, text=found.answer, flagged=found.flagged, level=question.level if found.flagged else None,
        score=found.score, uncertain=found.uncertain,
    )  # fmt: skip


def _log_sum(logs: Sequence[float]) -> float:
    top = max(logs)
    return top + math.log(math.fsum(math.exp(log - top) for log in logs)) if math.isfinite(top) else top
