"""Every question asked of every item: in windows that fit into memory, in rounds where questions wait for others.

What is known from before is not asked again. Answers come in the order of items and questions, whatever the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qvsplit.answering.checks import Question, rounds
from qvsplit.answering.requests import CANCELLED, SKIPPED, PromptItems, Questioner
from qvsplit.errors import QvsplitError, UsageError
from qvsplit.output.answer import Answer
from qvsplit.output.levels import UNSURE

PROMPT_TOKENS = 64  # of a prompt's prefix beside its items', about
Recall = Callable[[PromptItems, Question], Answer | None]


@dataclass(frozen=True)
class WindowLimits:
    """How much is answered before the first of it is handed on: questions, and tokens of new prefixes.

    All prefixes of a window should fit into the engine's cache: each round of questions needs them again.
    """

    questions: int = 64
    tokens: int = 14_000


@dataclass(frozen=True)
class SurveyOptions:
    """How a survey goes about it.

    Attributes:
        recall: Gives the answer that is known already, or None.
        on_answer: Hears each answer that the engine gave as soon as its batch is done.
        limits: Of one window.
    """

    recall: Recall = lambda items, question: None
    on_answer: Callable[[Answer], None] = lambda answer: None
    limits: WindowLimits = WindowLimits()


@dataclass
class _Known:
    """One prompt's items, and what is known about them by a question's name."""

    items: PromptItems
    answers: dict[str, Answer]


class Survey(Iterator[Answer]):
    """The answers, in order: every question of the first item, then of the next.

    An answer may be one that was skipped, as its `only_if` did not hold, or that failed: then it carries the error's
    text, and all others are given nevertheless. Where the engine is cancelled the iteration ends early.

    Attributes:
        error: The first error of an answer so far; to be looked at after the last.
        cancelled: Whether the engine was.
    """

    def __init__(
        self,
        questioner: Questioner,
        items: Iterable[PromptItems],
        questions: Sequence[Question],
        options: SurveyOptions | None = None,
    ) -> None:
        """Take what is asked. UsageError where two different questions have one name, or wait for each other."""
        _check_names(questions)
        self.error: QvsplitError | None = None
        self.cancelled = False
        self._questioner = questioner
        self._items = items
        self._questions = list(questions)
        self._by_name = {question.name: question for question in questions}
        self._rounds = rounds(questions)
        self._options = options or SurveyOptions()
        self._answers = self._all()

    def __iter__(self) -> Iterator[Answer]:
        """Give itself: there is one iteration."""
        return self

    def __next__(self) -> Answer:
        """Give the next answer, asking as far as is needed."""
        return next(self._answers)

    def _all(self) -> Iterator[Answer]:
        for window in self._windows():
            for questions in self._rounds:
                self._ask_round(window, questions)
                if self.cancelled:
                    return
            for known in window:
                yield from (known.answers[question.name] for question in self._questions)

    def _windows(self) -> Iterator[list[_Known]]:
        """Cut the items, with what is known of them, into parts that are answered together."""
        limits, window = self._options.limits, list[_Known]()
        tokens = unknown = 0
        for items in self._items:
            known = self._recalled(items)
            missing = sum(q.name not in known and self._may_be_due(q, known) for q in self._questions)
            new = PROMPT_TOKENS + sum(row.n_tokens or 0 for row in items.rows) if missing else 0
            if window and (unknown >= limits.questions or (new and tokens + new > limits.tokens)):
                yield window
                window, tokens, unknown = [], 0, 0
            window.append(_Known(items, known))
            tokens, unknown = tokens + new, unknown + max(1, missing)
        if window:
            yield window

    def _recalled(self, items: PromptItems) -> dict[str, Answer]:
        recall = self._options.recall
        return {q.name: answer for q in self._questions if (answer := recall(items, q)) is not None}

    def _ask_round(self, window: Sequence[_Known], questions: Sequence[Question]) -> None:
        """Ask what is due of one round, and put the answers where they belong."""
        pairs: list[tuple[PromptItems, Question]] = []
        places: list[dict[str, Answer]] = []
        for known in window:
            waiting: set[str] = set()  # the same question may stand there twice
            for question in questions:
                if (instead := self._instead(known, question)) is not None:
                    known.answers[question.name] = instead
                elif question.name not in known.answers and question.name not in waiting:
                    waiting.add(question.name)
                    pairs.append((known.items, question))
                    places.append(known.answers)
        answered = 0
        for asked in self._questioner.ask(pairs):
            if asked.answer.finish_reason == CANCELLED:
                continue
            answered += 1
            places[asked.place][pairs[asked.place][1].name] = asked.answer
            self.error = self.error or asked.error
            self._options.on_answer(asked.answer)
        self.cancelled = answered < len(pairs)

    def _instead(self, known: _Known, question: Question) -> Answer | None:
        """Give what stands for an answer where `only_if` does not hold, or is not known to; None where it does."""
        condition = question.only_if
        if condition is None or _is_due(question, known.answers):
            return None
        other = known.answers[condition.id]
        if other.error is None:
            return self._questioner.skipped(known.items, question)
        return self._questioner.failed(known.items, question, f"{condition.id}, on which it hangs, has no answer")

    def _may_be_due(self, question: Question, known: Mapping[str, Answer]) -> bool:
        """Say whether `only_if` holds, or hangs on what is not known yet."""
        if question.only_if is None:
            return True
        other = self._by_name[question.only_if.id]
        if other.name in known and self._may_be_due(other, known):
            return _is_due(question, known)
        return other.name not in known and self._may_be_due(other, known)


def _is_due(question: Question, answers: Mapping[str, Answer]) -> bool:
    """Say whether `only_if` holds, by the answers of the rounds before."""
    condition = question.only_if
    if condition is None:
        return True
    other = answers[condition.id]
    if other.finish_reason == SKIPPED or other.error is not None:
        return False
    if other.text == UNSURE:
        return True  # it may hold, and what hangs on it may be what a gate is for
    return bool(other.flagged) if condition.choice is None else other.text == condition.choice


def _check_names(questions: Sequence[Question]) -> None:
    by_name: dict[str, Question] = {}
    for question in questions:
        if by_name.setdefault(question.name, question) != question:
            raise UsageError(f"two different questions have the name {question.name}; give one of them another id")
