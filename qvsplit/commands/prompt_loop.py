"""Questions one by one, on a terminal or from a pipe; the model and the prefixes of the items stay in memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from qvsplit.commands.prompt_items import Asked
from qvsplit.commands.prompt_lines import Lines, open_lines
from qvsplit.commands.prompt_words import (
    EXIT,
    HELP,
    IMAGE,
    IMAGES,
    NEW,
    SYSTEM,
    Line,
    help_lines,
    meaning_of,
)
from qvsplit.commands.questions import as_text, with_choices_of
from qvsplit.commands.survey import answer_one
from qvsplit.commands.wording import on_command_line
from qvsplit.errors import QvsplitError, UsageError, escaped, printable
from qvsplit.output.names import count_rows, shown_name
from qvsplit.output.text import say
from qvsplit.runtime import interrupts
from qvsplit.runtime.interrupts import Terminated

if TYPE_CHECKING:
    from qvsplit.answering.checks import Question
    from qvsplit.ask import PromptItems
    from qvsplit.output.answer import Answer
    from qvsplit.output.printer import AnswerPrinter

MOST_OF_A_NAME = 40  # characters, in a prompt
NAMED = 3  # of many images
NO_IMAGE = "no image"


class PromptLoop:
    """Reads a line, answers it, and so on until the end.

    Args:
        asked: What is asked about.
        printer: Where answers go.
        choices: The text of --choices.
        remembers: Whether a question is given with those before it and their answers.
        lines: Where lines come from; by default stdin.
    """

    def __init__(
        self,
        asked: Asked,
        printer: AnswerPrinter,
        choices: str | None = None,
        *,
        remembers: bool = False,
        lines: Lines | None = None,
    ) -> None:
        self._asked = asked
        self._printer = printer
        self._choices = choices
        self._remembers = remembers
        self._lines = lines or open_lines(asked.suggestions, remembers=remembers)
        self._error: QvsplitError | None = None  # the first
        self._is_interrupted = False  # by Ctrl-C at the last prompt

    def run(self) -> None:
        """Answer until the end. With lines from a pipe, typer.Exit with the code of the first error, if there was one.

        Ctrl-C ends the answer that is being generated; where lines come from a pipe it is raised.
        """
        what = "a question" if self._asked.items else f"{IMAGE} and a name, Tab completes it"
        self._tell(f"{self._counted()}; type {what}, {HELP} for help, Ctrl-D to end")
        while (line := self._read()) is not None:
            try:
                if not self._take(line):
                    break
            except QvsplitError as error:
                self._report(error)
        if self._error is not None and not self._lines.are_typed:
            raise typer.Exit(self._error.exit_code)

    def _read(self) -> str | None:
        """Give the next line; None at the end: also where Ctrl-C comes twice, the second time with nothing typed."""
        while True:
            try:
                line = self._lines.read(_prompt(self._asked.items))
            except Terminated:
                raise
            except KeyboardInterrupt:
                if not self._lines.are_typed:
                    raise
                interrupts.clear()
                if self._is_interrupted and not self._lines.discarded:
                    return None
                self._is_interrupted = True
                say("Ctrl-C once more, or Ctrl-D, ends")
                continue
            self._is_interrupted = False
            return line

    def _take(self, line: str) -> bool:
        """Do what a line says. Returns whether there may be another."""
        meant = meaning_of(line, remembers=self._remembers)
        if meant.command == EXIT:
            return False
        try:
            if meant.command:
                self._obey(meant)
            elif meant.text:
                self._answer(meant.text)
        except Terminated:
            raise
        except KeyboardInterrupt:
            if not self._lines.are_typed:
                raise
            interrupts.clear()
            is_answer = self._remembers and not meant.command
            say("stopped; the conversation goes on without that answer" if is_answer else "stopped")
        return True

    # ----------------------------------------------------------------------------------------------------- commands

    def _obey(self, meant: Line) -> None:
        if meant.command == HELP:
            _show(help_lines(remembers=self._remembers, is_edited=self._lines.are_edited))
        elif meant.command == IMAGE:
            self._image(meant.text)
        elif meant.command == IMAGES:
            self._images(meant.text)
        elif meant.command == SYSTEM:
            self._system(meant.text)
        elif meant.command == NEW:
            self._asked.forget()
            self._tell("a new conversation")

    def _image(self, name: str) -> None:
        if not name:
            self._tell(self._counted())
            return
        self._asked.choose(name)
        new = "; a new conversation" if self._remembers else ""
        self._tell(f"{self._counted()}{new}")

    def _images(self, name: str) -> None:
        names, number = self._asked.listed(name)
        more = f"... and {number - len(names):,} more; {IMAGES} NAME lists those that a name or a glob matches"
        _show([*names, *([more] if number > len(names) else [])])

    def _system(self, text: str) -> None:
        if text:
            self._asked.set_system(None if text == "-" else as_text(text, "the system message"))
        system = self._asked.system
        if not text or self._lines.are_typed:
            _show([f"system message: {printable(system)}" if system else "system message: the chat template's own"])

    def _counted(self) -> str:
        """Name the image that is asked about, or count several; where there is none, those to choose from."""
        rows = [row for one in self._asked.items for row in one.rows]
        if rows:
            return escaped(shown_name(rows[0])) if len(rows) == 1 else count_rows(rows)
        names, number = self._asked.listed("", NAMED)
        where = escaped(self._asked.session.store.name)
        return f"{number:,} in {where}: {', '.join(names)}{' ...' if number > len(names) else ''}"

    def _tell(self, line: str) -> None:
        if self._lines.are_typed:
            say(line)

    # ------------------------------------------------------------------------------------------------------ answers

    def _answer(self, text: str) -> None:
        from qvsplit.answering.checks import Question
        from qvsplit.answering.requests import Turn

        asked = self._asked
        if not asked.items:
            raise UsageError(f"no image is chosen: {IMAGE} NAME chooses one, {IMAGES} lists them")
        question = with_choices_of(Question(as_text(text, "the question")), self._choices)
        self._printer.single = len(asked.items) == 1
        try:
            answers = self._answers(question)
        except QvsplitError as error:
            self._report(error, self._advice())
            return
        if self._remembers:
            turns = [(Turn(one.question, one.text),) if one.text and one.error is None else () for one in answers]
            asked.items = [
                replace(one, earlier=one.earlier + turn) for one, turn in zip(asked.items, turns, strict=True)
            ]
        self._say_cut(answers)
        if self._lines.are_typed:
            print(file=sys.stderr, flush=True)

    def _answers(self, question: Question) -> list[Answer]:
        asked, printer = self._asked, self._printer
        if len(asked.items) == 1:
            return [answer_one(asked.session, asked.items[0], question, printer)]
        answers = []
        for answer in asked.session.survey(asked.items, [question]):
            printer.answer(answer)
            answers.append(answer)
            interrupts.check()
        return answers

    def _report(self, error: QvsplitError, advice: str = "") -> None:
        self._error = self._error or error
        say(_in_loop(error) + advice)

    def _advice(self) -> str:
        """Say behind an error how to go on where what was said before may be what is wrong: it is too long, say."""
        return f"; {NEW} begins without the earlier answers" if any(one.earlier for one in self._asked.items) else ""

    def _say_cut(self, answers: Sequence[Answer]) -> None:
        if any(answer.is_cut_thought for answer in answers):
            say("cut at --max-new-tokens before the model had done thinking; allow more")
        elif any(answer.finish_reason == "length" for answer in answers):
            say("cut at --max-new-tokens; allow more for longer answers")


def _show(lines: Sequence[str]) -> None:
    """Print lines for people, which are no results, and of which each is safe for a terminal."""
    print("\n".join(lines), file=sys.stderr, flush=True)


def _in_loop(error: QvsplitError) -> str:
    """Give the message of an error in the words of the loop."""
    return on_command_line(str(error).replace("`image`", IMAGE))


def _prompt(items: Sequence[PromptItems]) -> str:
    """Give the prompt: which image, or how many, is asked about."""
    rows = [row for one in items for row in one.rows]
    if len(rows) != 1:
        return f"{count_rows(rows) if rows else NO_IMAGE}> "
    name = escaped(rows[0].name.rpartition("/")[2])
    return f"{name if len(name) <= MOST_OF_A_NAME else '...' + name[3 - MOST_OF_A_NAME :]}> "
