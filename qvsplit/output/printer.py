"""Answers and verdicts on stdout: streamed on a terminal, JSON Lines, or tab-separated lines for a pipe.

In tab-separated lines a path is the file's own (`errors.escaped`), with the part and its seconds where that is one of a
video; in every other field each run of blanks, tabs and line ends is one blank.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qvsplit.errors import escaped, printable
from qvsplit.output.names import shown_name
from qvsplit.output.text import bold, print_json
from qvsplit.runtime.streams import is_terminal

if TYPE_CHECKING:
    from qvsplit.output.answer import Answer
    from qvsplit.output.verdicts import ItemVerdict
    from qvsplit.store.row import Row


class AnswerPrinter:
    """Prints answers and verdicts.

    Args:
        as_json: One JSON object a line.
        single: There is one answer in all: its text alone is printed.
        one_root: All items have one root: their paths are printed without it.
        logprobs: Print the log-probability of every choice.
    """

    def __init__(self, *, as_json: bool, single: bool, one_root: bool, logprobs: bool = False) -> None:
        self.as_json = as_json
        self.single = single
        self.streams = is_terminal(sys.stdout) and not as_json  # text can be shown while it is generated
        self._one_root = one_root
        self._logprobs = logprobs

    def heading(self, rows: Sequence[Row], question: str) -> None:
        """Print what is asked of what, above an answer on a terminal."""
        if not self.single:
            names = ", ".join(map(self._name, rows))
            print(f"\n{bold(names)}  {printable(question)}", flush=True)

    def part(self, text: str) -> None:
        """Print the next part of an answer that is being generated."""
        print(printable(text, keep="\n\t"), end="", flush=True)

    def end_of_answer(self) -> None:
        """End the line after the last part."""
        print(flush=True)

    def answer(self, answer: Answer) -> None:
        """Print one finished answer."""
        if self.as_json:
            print_json(answer.to_json())
        elif self.streams:
            self.heading(answer.rows, answer.name)
            print(printable("  ".join([answer.text, *self._scores(answer)]), keep="\n\t"), flush=True)
        elif self.single:
            print("\t".join([answer.text, *self._scores(answer)]), flush=True)
        else:
            self._line(answer.rows, [answer.name, answer.text, *self._scores(answer)])

    def verdict(self, item: ItemVerdict) -> None:
        """Print the verdict on an item: with the checks that were flagged, or the reason of an error."""
        if self.as_json:
            print_json(item.to_json())
        else:
            self._line(item.rows, ["verdict", item.verdict, item.error or ",".join(item.flagged)])

    def _line(self, rows: Sequence[Row], parts: list[str]) -> None:
        names = ",".join(map(self._name, rows))
        print("\t".join([names, *(printable(" ".join(part.split())) for part in parts)]), flush=True)

    def _scores(self, answer: Answer) -> list[str]:
        """Give probability, level and log-probabilities: nothing for generated text."""
        if answer.error is not None:
            return ["error", answer.error]
        if answer.probabilities is None:
            return ["skipped"] if answer.finish_reason == "skipped" else []
        scores = [f"{answer.probability:.3f}", (answer.level or "") if answer.flagged else ""]
        if self._logprobs:
            scores += [f"{name}={value:.4f}" for name, value in (answer.logprobs or {}).items()]
        return scores if any(scores[1:]) else scores[:1]

    def _name(self, row: Row) -> str:
        return escaped(shown_name(row, with_root=not self._one_root))
