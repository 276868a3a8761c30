"""The questions of `qvsplit ask`: from the command line, a file, a file of checks, or a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qvsplit.errors import UsageError, escaped, some_of
from qvsplit.runtime.names import utf8_text
from qvsplit.runtime.streams import is_terminal

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

    _refuse_files(sources.words)
    texts = [*(as_text(word, "a question") for word in sources.words), *_lines(sources)]
    stripped = [text.rstrip("\r") for text in texts if text.strip()]
    questions = [with_choices_of(Question(text), sources.choices) for text in stripped]
    questions += read_checks(sources.checks) if sources.checks is not None else []
    if not questions:
        raise UsageError('no question; give one in quotes: qvsplit ask "What is in the image?"')
    return questions


def _refuse_files(questions: Sequence[str]) -> None:
    """UsageError where a question is the path of a file: an image to be asked about, most likely."""
    from qvsplit.sources.folders import SUFFIXES

    files = [word for word in questions if os.path.isfile(word)]
    if not files:
        return
    name = files[0]
    option = "--image" if os.path.splitext(name)[1].lower() in SUFFIXES else "--image or --questions"
    if len(files) == 1:
        raise UsageError(f"{escaped(name)} is a file; did you mean {option} {escaped(name)}?")
    raise UsageError(f"{some_of(map(escaped, files), 3)} are files; did you mean {option} before each of them?")


def _lines(sources: QuestionSources) -> list[str]:
    try:
        if sources.file is not None:
            return sources.file.read_text(encoding="utf-8-sig").split("\n")
        if not sources.words and sources.checks is None and sys.stdin is not None:
            return _piped().removeprefix("\ufeff").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"questions cannot be read from {sources.file or 'the pipe'} ({error})") from None
    return []


def _piped() -> str:
    """Read the pipe: UTF-8, or else in the encoding of the locale."""
    buffer = getattr(sys.stdin, "buffer", None)
    if buffer is None:  # a program that calls the command has put a text in place of it
        return sys.stdin.read()
    data = buffer.read()
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        with suppress(UnicodeDecodeError):
            return str(data, sys.stdin.encoding)
        raise error


def as_text(text: str, what: str) -> str:
    """Give what was typed as UTF-8 reads it, or else the locale. UsageError, naming `what` it is, if neither can."""
    if text.isascii():
        return text
    utf8 = utf8_text(text)
    for reading in (utf8, text):
        with suppress(UnicodeEncodeError):  # a byte that could not be read is half a surrogate pair
            reading.encode()
            return reading
    raise UsageError(f"{what} is not text in UTF-8: {text}")


def with_choices_of(question: Question, choices: str | None) -> Question:
    """Give `question` with the choices of --choices, such as `yes,no`."""
    from qvsplit.answering.checks import with_choices

    if choices is None:
        return question
    return with_choices(question, [choice.strip() for choice in choices.split(",")])
