"""What a caller of the public API gives: things, questions, functions; UsageError names the argument that is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qvsplit.answering.checks import Question
from qvsplit.answering.requests import Turn
from qvsplit.errors import UsageError
from qvsplit.runtime import arguments
from qvsplit.store.store import Store


def each(given: Any, name: str, kind: Any, wanted: str) -> list[tuple[Any, str]]:
    """Give one thing, or several, each with its place for messages. UsageError for what is none of the kind."""
    if isinstance(given, kind):
        return [(given, name)]
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping | Store):
        raise arguments.wrong(name, given, wanted)
    placed = [(one, f"{name}[{number}]") for number, one in enumerate(given)]
    for one, place in placed:
        if not isinstance(one, kind):
            raise arguments.wrong(place, one, wanted)
    if not placed:
        raise UsageError(f"{name}: give {wanted}, not none")
    return placed


def a_question(question: object, name: str = "question") -> Question:
    """Give a question that was given as one, or as text. UsageError for anything else."""
    if isinstance(question, Question):
        return question
    if not isinstance(question, str):
        raise arguments.wrong(name, question, "a text or a Question")
    return Question(question)


def questions_of(questions: object) -> list[Question]:
    """Give a list of questions. UsageError for one alone, and for anything else."""
    if isinstance(questions, str | Question):
        raise UsageError("questions: give a list of questions; one alone is asked with answer()")
    if not isinstance(questions, Iterable) or isinstance(questions, bytes | Mapping):
        raise arguments.wrong("questions", questions, "a list of questions")
    return [a_question(question, f"questions[{number}]") for number, question in enumerate(questions)]


def turns_of(earlier: object) -> tuple[Turn, ...]:
    """Give the questions before one, each with its answer. UsageError for what are no pairs of texts."""
    wanted = "a list of questions, each with its answer"
    if not isinstance(earlier, Iterable) or isinstance(earlier, str | bytes | Mapping):
        raise arguments.wrong("earlier", earlier, wanted)
    turns: list[Turn] = []
    for number, pair in enumerate(earlier):
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise arguments.wrong(f"earlier[{number}]", pair, "a question and its answer, both texts")
        turns.append(Turn(*pair))
    return tuple(turns)


def a_callback(name: str, given: Any) -> Any:
    """Give a function, or None. UsageError for anything else."""
    if given is not None and not callable(given):
        raise arguments.wrong(name, given, "a function")
    return given
