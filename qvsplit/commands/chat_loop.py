"""Questions one by one, on a terminal or from a pipe; the model and the prefixes of the items stay in memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import typer

from qvsplit.commands.ask_files import LIMITS, Limits
from qvsplit.commands.chat_items import ChatItems, say_failed
from qvsplit.commands.chat_lines import Lines, open_lines
from qvsplit.commands.chat_words import (
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
from qvsplit.commands.placement import ONE_EACH, Placement, require_items
from qvsplit.commands.questions import as_text, with_choices_of
from qvsplit.commands.survey import answer_one
from qvsplit.commands.wording import on_command_line, say_note
from qvsplit.errors import OutOfMemory, QvsplitError, RequestError, StoreDamaged, UsageError, escaped, printable
from qvsplit.output.names import count_rows, shown_name
from qvsplit.output.progress import ProgressBar
from qvsplit.output.text import plural, say
from qvsplit.runtime import interrupts
from qvsplit.runtime.interrupts import Terminated

if TYPE_CHECKING:
    from qvsplit.answering.checks import Question
    from qvsplit.answering.collection import Collection
    from qvsplit.ask import AskOptions, PromptItems
    from qvsplit.output.answer import Answer
    from qvsplit.output.printer import AnswerPrinter, PrintOptions

MOST_OF_A_NAME = 40  # characters, in a prompt
NAMED = 3  # of many images
NO_IMAGE = "no image"
OF_ONE_QUESTION = (UsageError, RequestError, OutOfMemory)  # errors behind which others may be answered


def load_and_run(
    found: Collection,
    names: Sequence[str],
    options: AskOptions,
    printing: PrintOptions,
    *,
    placement: Placement = ONE_EACH,
    choices: str | None = None,
    remembers: bool = False,
    quiet: bool = False,
    progress: str = "auto",
    limits: Limits = LIMITS,
) -> None:
    """Load the language model, and answer what is typed about the items of these names, of all without names.

    What `remembers` begins with none of several items where no name is given. The rest as for `ChatLoop`.

    Raises:
        UsageError: None of the items can be asked about.
    """
    from qvsplit.answering.selection import select
    from qvsplit.ask import load_session

    items: list[PromptItems] = []
    if names or not remembers or len(list(islice(found, 2))) < 2:
        selection = select(found, names)
        items = placement.prompts(selection, placement.row(found))
        say_failed(selection.failed if names or not remembers else ())
        require_items(items)
    with ProgressBar(progress, shown=not quiet) as shown, interrupts.at_once():  # only reading so far
        session = load_session(found, options, on_load=shown.loading)
    for note in session.notes() if not quiet else ():
        say_note(note)
    chosen = ChatItems(session, items, placement, quiet, progress, limits)
    chosen.keep(found)
    ChatLoop(chosen, printing, choices, remembers=remembers).run()


class ChatLoop:
    """Reads a line, answers it, and so on until the end.

    Args:
        chosen: What questions are about.
        printing: How answers are printed.
        choices: The text of --choices.
        remembers: Whether a question is given with those before it and their answers.
        lines: Where lines come from; by default stdin.
    """

    def __init__(
        self,
        chosen: ChatItems,
        printing: PrintOptions,
        choices: str | None = None,
        *,
        remembers: bool = False,
        lines: Lines | None = None,
    ) -> None:
        self._chosen = chosen
        self._printing = printing
        self._choices = choices
        self._remembers = remembers
        self._lines = lines or open_lines(chosen.suggestions, remembers=remembers)
        self._error: QvsplitError | None = None  # the first
        self._cut = 0  # answers, of lines from a pipe
        self._is_interrupted = False  # by Ctrl-C at the last prompt

    def run(self) -> None:
        """Answer until the end, and print what went wrong.

        Lines from a pipe end with a command that fails, too: those behind it were meant for another image, say. Ctrl-C
        ends the answer that is being generated; where lines come from a pipe it is raised.

        Raises:
            QvsplitError: No other question can be answered either, or an answer cannot be written.
            typer.Exit: With the code of the first error, if there was one, of lines from a pipe.
        """
        what = "a question" if self._chosen.items else f"{IMAGE} and a name, Tab completes it"
        self._tell(f"{self._counted()}; type {what}, {HELP} for help, Ctrl-D to end")
        while (line := self._read()) is not None and self._take(line):
            pass
        self._say_cut()
        if self._error is not None and not self._lines.are_typed:
            raise typer.Exit(self._error.exit_code)

    def _read(self) -> str | None:
        """Give the next line; None at the end: also where Ctrl-C comes twice, the second time with nothing typed."""
        while True:
            try:
                line = self._lines.read(_prompt(self._chosen.items))
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
        try:
            meant = meaning_of(line, remembers=self._remembers)
            if meant.command:
                return meant.command != EXIT and self._obey(meant)
        except Terminated:
            raise
        except KeyboardInterrupt:
            self._stop("stopped")
            return True
        except QvsplitError as error:  # all is as it was before
            self._report(error)
            return self._lines.are_typed
        if meant.text:
            self._take_question(meant.text)
        return True

    def _take_question(self, text: str) -> None:
        try:
            self._answer(text)
        except Terminated:
            raise
        except KeyboardInterrupt:
            goes_on = "; the conversation goes on without what was not answered" if self._remembers else ""
            self._stop(f"stopped{goes_on}")
        except OF_ONE_QUESTION as error:
            self._report(error, self._advice())
        except StoreDamaged as error:  # another image may be sound, and somebody is there who may choose it
            if not self._lines.are_typed:
                raise
            self._report(error)

    def _stop(self, said: str) -> None:
        """Go on after Ctrl-C, which is being handled; where lines come from a pipe raise it again."""
        if not self._lines.are_typed:
            raise
        interrupts.clear()
        say(said)

    # ----------------------------------------------------------------------------------------------------- commands

    def _obey(self, meant: Line) -> bool:
        if meant.command == HELP:
            _show(help_lines(remembers=self._remembers, is_edited=self._lines.are_edited))
        elif meant.command == IMAGE:
            self._image(meant.text)
        elif meant.command == IMAGES:
            self._images(meant.text)
        elif meant.command == SYSTEM:
            self._system(meant.text)
        elif meant.command == NEW:
            self._chosen.begin_again()
            self._tell("a new conversation")
        return True

    def _image(self, name: str) -> None:
        if not name:
            self._tell(self._counted())
            return
        self._chosen.choose(name)
        new = "; a new conversation" if self._remembers else ""
        self._tell(f"{self._counted()}{new}")

    def _images(self, name: str) -> None:
        names, number = self._chosen.listed(name)
        more = f"... and {number - len(names):,} more; {IMAGES} NAME lists those that a name or a glob matches"
        _show([*names, *([more] if number > len(names) else [])])

    def _system(self, text: str) -> None:
        if text:
            self._chosen.set_system(None if text == "-" else as_text(text, "the system message"))
        system = self._chosen.system
        if not text or self._lines.are_typed:
            _show([f"system message: {printable(system)}" if system else "system message: the chat template's own"])

    def _counted(self) -> str:
        """Name the image that is asked about, or count several; where there is none, those to choose from."""
        rows = [row for one in self._chosen.items for row in one.rows]
        if rows:
            return escaped(shown_name(rows[0])) if len(rows) == 1 else count_rows(rows)
        names, number = self._chosen.listed("", NAMED)
        where = escaped(self._chosen.session.store.name)
        counted = "1 item" if number == 1 else f"{number:,} items"
        return f"{counted} in {where}: {', '.join(names)}{' ...' if number > len(names) else ''}"

    def _tell(self, line: str) -> None:
        if self._lines.are_typed and not self._chosen.quiet:
            say(line)

    # ------------------------------------------------------------------------------------------------------ answers

    def _answer(self, text: str) -> None:
        from qvsplit.answering.checks import Question

        chosen = self._chosen
        if not chosen.items:
            raise UsageError(f"no image is chosen: {IMAGE} NAME chooses one, {IMAGES} lists them")
        question = with_choices_of(Question(as_text(text, "the question")), self._choices)
        printer = self._printer()
        if len(chosen.items) == 1:
            self._heard(0, answer_one(chosen.session, chosen.items[0], question, printer))
        else:
            self._answer_each(question, printer)
        if self._lines.are_typed:
            self._say_cut()
            print(file=sys.stderr, flush=True)

    def _answer_each(self, question: Question, printer: AnswerPrinter) -> None:
        """Ask about each prompt's items. One that cannot be answered does not keep the others from it."""
        survey = self._chosen.session.survey(self._chosen.items, [question])
        for place, answer in enumerate(survey):
            printer.answer(answer)
            self._heard(place, answer)
            interrupts.check()
        if survey.cancelled:
            raise KeyboardInterrupt
        if survey.error is not None:
            self._report(survey.error, self._advice())

    def _heard(self, place: int, answer: Answer) -> None:
        """Continue a conversation by an answer, and say what is not whole."""
        from qvsplit.answering.requests import Turn

        if answer.error is not None:
            return
        if self._remembers and answer.text:
            items = self._chosen.items[place]
            self._chosen.items[place] = replace(items, earlier=(*items.earlier, Turn(answer.question, answer.text)))
        goes_on = "; the conversation goes on without that question" if self._remembers else ""
        if answer.is_cut_thought:
            say(f"cut at --max-new-tokens before the model had done thinking; allow more{goes_on}")
        elif not answer.text:
            say(f"the answer is empty{goes_on}")
        elif answer.finish_reason == "length" and not self._chosen.quiet:
            self._cut += 1

    def _say_cut(self) -> None:
        """Say how many answers were cut: on a terminal behind each question, else once."""
        if self._cut:
            were = plural(self._cut, "answer was", "answers were")
            say(f"{were} cut at --max-new-tokens; allow more for longer answers")
        self._cut = 0

    def _printer(self) -> AnswerPrinter:
        from qvsplit.output.printer import AnswerPrinter

        items = self._chosen.items
        roots = {row.root for one in items for row in one.rows}
        return AnswerPrinter(self._printing, single=len(items) == 1, one_root=len(roots) == 1)

    def _report(self, error: QvsplitError, advice: str = "") -> None:
        self._error = self._error or error
        say(_in_loop(error) + advice)

    def _advice(self) -> str:
        """Say behind an error how to go on where what was said before may be what is wrong: it is too long, say."""
        return f"; {NEW} begins without the earlier answers" if any(one.earlier for one in self._chosen.items) else ""


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
