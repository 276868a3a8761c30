"""The questions of `qvsplit ask`: from the command line, a file, a file of checks, or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qvsplit.errors import UsageError
from qvsplit.output.text import is_terminal

if TYPE_CHECKING:
    from qvsplit.answering.checks import Question


@dataclass(frozen=True)
class QuestionSources:
    """Where questions come from. `choices` is the text of --choices, which holds for those that are not checks."""

    words: Sequence[str] = ()
    file: Path | None = None
    checks: Path | None = None
    choices: str | None = None

    @property
    def are_typed(self) -> bool:
        """Whether questions are typed one by one on a terminal, as none is given."""
        return not self.words and self.file is None and self.checks is None and is_terminal(sys.stdin)


def read_questions(sources: QuestionSources) -> list[Question]:
    """Give all questions: the command line's, a file's, the checks, and, where none has any, the pipe's."""
    from qvsplit.answering.checks import Question, read_checks

    texts = [*sources.words, *_lines(sources)]
    stripped = [text.rstrip("\r") for text in texts if text.strip()]
    questions = [with_choices_of(Question(text), sources.choices) for text in stripped]
    questions += read_checks(sources.checks) if sources.checks is not None else []
    if not questions:
        raise UsageError('no question; give one in quotes: qvsplit ask "What is in the image?"')
    return questions


def _lines(sources: QuestionSources) -> list[str]:
    try:
        if sources.file is not None:
            return sources.file.read_text(encoding="utf-8-sig").split("\n")
        if not sources.words and sources.checks is None and sys.stdin is not None:
            return sys.stdin.read().removeprefix("\ufeff").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"questions cannot be read from {sources.file or 'the pipe'} ({error})") from None
    return []


def with_choices_of(question: Question, choices: str | None) -> Question:
    """Give `question` with the choices of --choices, such as `yes,no`."""
    from qvsplit.answering.checks import with_choices

    if choices is None:
        return question
    return with_choices(question, [choice.strip() for choice in choices.split(",")])
