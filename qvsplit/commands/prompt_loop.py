"""Questions typed one by one on a terminal; the model and the prefixes of the images stay in memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qvsplit.commands.questions import with_choices_of
from qvsplit.commands.survey import answer_one
from qvsplit.errors import QvsplitError
from qvsplit.output.text import plural, say
from qvsplit.runtime import interrupts
from qvsplit.runtime.interrupts import Terminated

if TYPE_CHECKING:
    from qvsplit.ask import PromptItems, Session
    from qvsplit.output.printer import AnswerPrinter


def prompt_loop(session: Session, items: Sequence[PromptItems], printer: AnswerPrinter, choices: str | None) -> None:
    """Answer until an empty line or Ctrl-D. Ctrl-C stops the answer that is being generated."""
    images = plural(sum(len(one.rows) for one in items), "image")
    say(f"{images}; type a question, or an empty line to end")
    while text := _typed():
        try:
            _answer(session, items, printer, text, choices)
        except Terminated:
            raise
        except KeyboardInterrupt:
            interrupts.clear()
            say("the answer was stopped")
        except QvsplitError as error:
            say(str(error))


def _typed() -> str:
    print("? ", end="", file=sys.stderr, flush=True)
    try:
        return input().strip()
    except EOFError:
        print(file=sys.stderr)
        return ""


def _answer(
    session: Session, items: Sequence[PromptItems], printer: AnswerPrinter, text: str, choices: str | None
) -> None:
    from qvsplit.answering.checks import Question

    question = with_choices_of(Question(text), choices)
    if len(items) == 1:
        answer_one(session, items[0], question, printer)
        return
    for answer in session.survey(items, [question]):
        printer.answer(answer)
