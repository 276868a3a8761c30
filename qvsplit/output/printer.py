"""Answers and verdicts on stdout: for people, or as lines for programs (docs/output.md is the contract).

For people they are streamed where somebody watches. Lines for programs are tab-separated with the same columns whatever
is asked of what, JSON, or the paths of the items that did not pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qvsplit.errors import escaped, printable
from qvsplit.output.levels import PASS
from qvsplit.output.names import file_of, shown_name
from qvsplit.output.text import bold, print_json, print_path
from qvsplit.runtime.streams import is_terminal

if TYPE_CHECKING:
    from qvsplit.output.answer import Answer
    from qvsplit.output.verdicts import ItemVerdict
    from qvsplit.store.row import Row

TEXT, TSV, JSONL, PATHS, PATHS0 = "text", "tsv", "jsonl", "paths", "paths0"
COLUMNS = ("type", "path", "part", "name", "answer", "probability", "verdict", "detail")  # of tab-separated lines


@dataclass(frozen=True)
class PrintOptions:
    """How answers and verdicts are printed.

    Attributes:
        format: text, tsv, jsonl, paths or paths0; None is text on a terminal, and tsv elsewhere.
        absolute: Whether paths are whole, in place of relative to the current folder.
        logprobs: Whether lines have the log-probability of every choice.
        worded: How the reason why there is no answer is said to people; lines for programs have it as it is stored.
    """

    format: str | None = None
    absolute: bool = False
    logprobs: bool = False
    worded: Callable[[str], str] = str

    @property
    def chosen(self) -> str:
        """The format."""
        return self.format or (TEXT if is_terminal(sys.stdout) else TSV)

    @property
    def names_items(self) -> bool:
        """Whether only the paths of items that did not pass are printed."""
        return self.chosen in (PATHS, PATHS0)


class AnswerPrinter:
    """Prints answers and verdicts.

    Args:
        options: How.
        single: There is one answer in all: for people its text alone is printed.
        one_root: All items have one root: for people their paths are printed without it.
    """

    def __init__(self, options: PrintOptions, *, single: bool = False, one_root: bool = True) -> None:
        self.format = options.chosen
        self.single = single
        self.streams = self.format == TEXT and is_terminal(sys.stdout)  # text can be shown while it is generated
        self._options = options
        self._one_root = one_root
        self._named: set[str] = set()  # files whose paths have been printed: a video has several clips

    def heading(self, rows: Sequence[Row], question: str) -> None:
        """Print what is asked of what, above an answer for people."""
        if not self.single:
            print(f"\n{bold(self._names(rows))}  {printable(question)}", flush=True)

    def part(self, text: str) -> None:
        """Print the next part of an answer that is being generated."""
        print(printable(text, keep="\n\t"), end="", flush=True)

    def end_of_answer(self) -> None:
        """End the line after the last part."""
        print(flush=True)

    def answer(self, answer: Answer) -> None:
        """Print one finished answer."""
        if self.format == JSONL:
            print_json(answer.to_json(absolute=self._options.absolute))
        elif self.format == TSV:
            probability = "" if answer.choice_probability is None else f"{answer.choice_probability:.6g}"
            fields = [answer.name, answer.text, probability, answer.verdict or "", self._detail(answer)]
            self._line("answer", answer.rows, fields)
        elif self.format == TEXT:
            self.heading(answer.rows, answer.name)
            print(printable("  ".join([answer.text, *self._scores(answer)]).strip(), keep="\n\t"), flush=True)

    def verdict(self, item: ItemVerdict) -> None:
        """Print the verdict on an item, with the checks that it hangs on; or its path, if it did not pass."""
        if self.format == JSONL:
            print_json(item.to_json(absolute=self._options.absolute))
        elif self.format == TSV:
            self._line("verdict", item.rows, ["", "", "", item.verdict, item.reason])
        elif self.format == TEXT:
            told = replace(item, error=self._options.worded(item.error))
            reason = [printable(text) for text in (told.reason, told.unseen) if text]
            print("  ".join([bold(self._names(item.rows)), item.verdict, *reason]), flush=True)
        elif item.verdict != PASS:
            self._paths(item.rows)

    def _paths(self, rows: Sequence[Row]) -> None:
        for file in (file_of(row, absolute=self._options.absolute) for row in rows):
            if file not in self._named:
                self._named.add(file)
                print_path(file, nul=self.format == PATHS0)

    def _line(self, kind: str, rows: Sequence[Row], fields: Sequence[str]) -> None:
        files = [escaped(file_of(row, absolute=self._options.absolute)) for row in rows]
        if len(files) > 1:
            files = [file.replace(",", r"\x2c") for file in files]
        parts = ",".join(str(row.part) if row.is_part else "" for row in rows) if any(r.is_part for r in rows) else ""
        cells = [printable(" ".join(field.split())) for field in fields]
        print("\t".join([kind, ",".join(files), parts, *cells]), flush=True)

    def _detail(self, answer: Answer) -> str:
        """Give why there is no answer, or, where they are wanted, the log-probabilities."""
        if answer.error is not None:
            return answer.error
        if answer.finish_reason == "skipped":
            return "skipped"
        return " ".join(self._logprobs(answer))

    def _scores(self, answer: Answer) -> list[str]:
        """Give for people what is known of an answer: of generated text nothing."""
        if answer.error is not None:
            return ["error", self._options.worded(answer.error)]
        if answer.choice_probability is None:
            return ["skipped"] if answer.finish_reason == "skipped" else []
        if answer.uncertain:
            return [f"uncertain: it would rather have said something else (choice mass {answer.choice_mass:.1e})"]
        return [f"{answer.choice_probability:.3f}", *([answer.level] if answer.level else []), *self._logprobs(answer)]

    def _logprobs(self, answer: Answer) -> list[str]:
        if not self._options.logprobs:
            return []
        return [f"{name}={value:.4f}" for name, value in (answer.logprobs or {}).items()]

    def _names(self, rows: Sequence[Row]) -> str:
        return ", ".join(escaped(shown_name(row, with_root=not self._one_root)) for row in rows)
