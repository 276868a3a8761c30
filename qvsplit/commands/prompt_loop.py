"""Questions typed one by one on a terminal; the model and the prefixes of the items stay in memory."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from qvsplit.commands.questions import as_text, with_choices_of
from qvsplit.commands.survey import answer_one
from qvsplit.errors import QvsplitError, UsageError
from qvsplit.output.names import count_rows
from qvsplit.output.text import say
from qvsplit.runtime import interrupts
from qvsplit.runtime.interrupts import Terminated

if TYPE_CHECKING:
    from qvsplit.ask import PromptItems, Session
    from qvsplit.output.printer import AnswerPrinter


def prompt_loop(session: Session, items: Sequence[PromptItems], printer: AnswerPrinter, choices: str | None) -> None:
    """Answer until an empty line or Ctrl-D. Ctrl-C stops the answer that is being generated."""
    shown = count_rows(row for one in items for row in one.rows)
    say(f"{shown}; type a question, or an empty line to end")
    while text := _typed():
        try:
            _answer(session, items, printer, as_text(text, "the question"), choices)
        except Terminated:
            raise
        except KeyboardInterrupt:
            interrupts.clear()
            say("the answer was stopped")
        except QvsplitError as error:
            say(str(error))


def _typed() -> str:
    """Give the line that is typed, as Python gives words of the command line; empty at the end."""
    before = signal.signal(signal.SIGCONT, _show_prompt)  # stopped by Ctrl-Z, it comes back below the shell's lines
    try:
        _show_prompt()
        line = _line(sys.stdin.fileno())
    except OSError as error:
        raise UsageError(f"no question can be read from the terminal ({error.strerror})") from None
    finally:
        signal.signal(signal.SIGCONT, before)
    if not line:
        print(file=sys.stderr)
    return os.fsdecode(line).strip()


def _show_prompt(*_: object) -> None:
    with suppress(OSError):  # nobody may be listening
        os.write(2, b"? ")  # not by print(), which must not be called again by a signal that interrupts it


def _line(terminal: int) -> bytes:
    """Read a line, which the terminal lets the user edit first; never for longer than there is something to read."""
    line = b""
    while not line.endswith(b"\n"):
        interrupts.wait_for_input(terminal)
        part = os.read(terminal, 4096)
        if not part:
            break
        line += part
    return line


def _answer(
    session: Session, items: Sequence[PromptItems], printer: AnswerPrinter, text: str, choices: str | None
) -> None:
    from qvsplit.answering.checks import Question

    question = with_choices_of(Question(text), choices)
    if len(items) == 1:
        answers = [answer_one(session, items[0], question, printer)]
    else:
        answers = []
        for answer in session.survey(items, [question]):
            printer.answer(answer)
            answers.append(answer)
    if any(answer.is_cut_thought for answer in answers):
        say("cut at --max-new-tokens before the model had done thinking; allow more")
