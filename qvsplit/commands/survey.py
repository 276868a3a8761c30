"""Ask every question about every item, and pass on what comes back: to stdout, a table, a report and the verdicts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qvsplit.commands.wording import on_command_line, say_note
from qvsplit.errors import DiskError, QvsplitError, escaped, size, some_of
from qvsplit.output.names import count_rows, shown_name
from qvsplit.output.printer import TEXT
from qvsplit.output.progress import ProgressBar
from qvsplit.output.text import plural, say
from qvsplit.output.verdicts import ItemVerdict, failure_reason, verdict_on_answers, verdict_on_failed
from qvsplit.runtime import interrupts
from qvsplit.runtime.streams import ReaderGone

if TYPE_CHECKING:
    from qvsplit.answering.checks import Question
    from qvsplit.answering.collection import Collection
    from qvsplit.answering.recorder import Recorder
    from qvsplit.answering.survey import Survey
    from qvsplit.ask import AskOptions, PromptItems, Session
    from qvsplit.output.answer import Answer
    from qvsplit.output.printer import AnswerPrinter, PrintOptions
    from qvsplit.output.table import Table
    from qvsplit.store.row import Row

MOST_SHOWN = 80  # characters of a question, in a line about it


@dataclass(frozen=True)
class SurveyPlan:
    """What is asked about what. `failed` are items of the selection that could not be encoded."""

    items: Sequence[PromptItems]
    questions: Sequence[Question]
    failed: Sequence[Row] = ()

    @property
    def has_checks(self) -> bool:
        """Whether any answer can be flagged."""
        return any(question.flag for question in self.questions)

    @property
    def counted(self) -> str:
        """How many items are asked about: `3 images and 2 videos`; prompts where several stand in one."""
        if any(len(items.rows) > 1 for items in self.items):
            return plural(len(self.items), "prompt")
        return count_rows(items.rows[0] for items in self.items)


@dataclass(frozen=True)
class Outputs:
    """Where answers go and how they are printed, and what trips the gate: `fail_on`, unless it is `allowed`."""

    table: Path | None
    report: Path | None
    fail_on: str | None
    printing: PrintOptions
    quiet: bool
    progress: str = "auto"
    allowed: frozenset[str] = frozenset()
    wide: Path | None = None

    @property
    def printed(self) -> bool:
        """Whether answers go to stdout."""
        return self.printing.format is not None or (self.table is None and self.report is None)


class Results:
    """What is kept of a survey's answers, as they come: verdicts, what deserves a warning, answers for a report."""

    def __init__(self, plan: SurveyPlan, outputs: Outputs, printer: AnswerPrinter) -> None:
        self.plan = plan
        self.outputs = outputs
        self.printer = printer
        self.progress = ProgressBar(outputs.progress, shown=not outputs.quiet, prints=outputs.printed)
        self.verdicts: list[ItemVerdict] = []
        self.answers: list[Answer] = []  # kept for a report
        self.error: QvsplitError | None = None  # of the first question that could not be answered
        self._uncertain: Counter[str] = Counter()  # by question
        self._cut = self._cut_thoughts = 0

    def add_failed(self) -> None:
        """Add the items that could not be encoded."""
        named = self.plan.has_checks or not self.outputs.quiet  # cron mails every line; without checks it is no news
        for row in self.plan.failed:
            if named:
                say(f"failed: {escaped(shown_name(row))} {on_command_line(failure_reason(row))}")
            self._add_verdict(verdict_on_failed(row))

    def add(self, answers: Sequence[Answer]) -> None:
        """Add all answers about one item, or about the items of one prompt."""
        self.answers += answers if self.outputs.report is not None else []
        for answer in answers:
            self._uncertain[answer.name] += answer.uncertain
            if answer.error is None and answer.recalled is None:
                self._cut += answer.finish_reason == "length"
                self._cut_thoughts += answer.is_cut_thought
        _say_errors(answers)
        item = verdict_on_answers(answers)
        if self.plan.has_checks or item.error:
            self._add_verdict(item)

    def _add_verdict(self, item: ItemVerdict) -> None:
        self.verdicts.append(item)
        if self.plan.has_checks and item.unseen:
            say(f"uncertain: {some_of((escaped(shown_name(row)) for row in item.rows), 3)}: {item.unseen}")
        if self.outputs.printed and (self.plan.has_checks or self.printer.format != TEXT):
            self.printer.verdict(item)

    def warn(self, *, answers_are_json: bool) -> None:
        """Say which probabilities mean little, and which answers are not whole."""
        for name, number in self._uncertain.items():
            if number:
                say(
                    f"{_shortened(name)}: uncertain for {number:,} of {self.plan.counted}: the model would rather have "
                    "said something else than any of the choices; name them in the question (docs/checks.md)"
                )
        if self._cut_thoughts:
            say(
                f"{plural(self._cut_thoughts, 'answer was', 'answers were')} cut at --max-new-tokens before the model "
                "had done thinking, and are empty; allow more"
            )
        if self._cut and answers_are_json:
            say(f"{plural(self._cut, 'answer was', 'answers were')} cut at --max-new-tokens and not valid JSON")


def _say_errors(answers: Sequence[Answer]) -> None:
    """Say which questions about one item, or about several together, could not be answered: a line for each reason."""
    questions: dict[str, list[str]] = {}
    for answer in answers:
        if answer.error is not None:
            questions.setdefault(answer.error, []).append(answer.name)
    items = some_of((escaped(shown_name(row)) for row in answers[0].rows), 3)
    for error, names in questions.items():
        say(f"not answered: {items}: {', '.join(map(_shortened, names))}: {on_command_line(error)}")


def _shortened(question: str) -> str:
    return question if len(question) <= MOST_SHOWN else f"{question[:MOST_SHOWN]}…"


def run_survey(session: Session, results: Results, recorder: Recorder | None = None) -> None:
    """Ask, print, record and keep; with `recorder`, only what its table does not know is asked."""
    plan, outputs, printer = results.plan, results.outputs, results.printer
    if recorder is None and outputs.printed and printer.streams and printer.single:
        results.add([answer_one(session, plan.items[0], plan.questions[0], printer)])
        return
    survey = _survey(session, plan, recorder)
    results.add_failed()  # only now: what is wrong with the questions comes before any output
    with results.progress as progress:
        progress.start("answers", len(plan.items) * len(plan.questions))
        answers = _passed_on(_recorded(survey, recorder), printer if outputs.printed else None, progress)
        for item in _in_groups(answers, len(plan.questions)):
            results.add(item)
            interrupts.check()
    results.error = survey.error
    if survey.cancelled:
        raise KeyboardInterrupt


def _survey(session: Session, plan: SurveyPlan, recorder: Recorder | None) -> Survey:
    if recorder is None:
        return session.survey(plan.items, plan.questions)
    return session.survey(plan.items, plan.questions, recall=recorder.recall, on_answer=recorder.put)


def _recorded(answers: Iterable[Answer], recorder: Recorder | None) -> Iterator[Answer]:
    for answer in answers:
        if recorder is not None:
            recorder.put(answer)
        yield answer


def _passed_on(answers: Iterable[Answer], printer: AnswerPrinter | None, progress: ProgressBar) -> Iterator[Answer]:
    for answer in answers:
        if printer is not None:
            printer.answer(answer)
        if answer.recalled is None and answer.finish_reason != "skipped":
            progress.advance()
        else:
            progress.skip()
        yield answer


def _in_groups(answers: Iterable[Answer], number: int) -> Iterator[list[Answer]]:
    """Give the answers about one item after another: `number` of them each."""
    group: list[Answer] = []
    for answer in answers:
        group.append(answer)
        if len(group) == number:
            yield group
            group = []


def answer_one(session: Session, items: PromptItems, question: Question, printer: AnswerPrinter) -> Answer:
    """Ask one question and print the answer, while it is generated where somebody watches."""
    if not printer.streams or question.choices is not None:
        answer = session.answer(items.rows, question, earlier=items.earlier)
        printer.answer(answer)
        return answer

    heard = False

    def hear(text: str) -> None:
        nonlocal heard
        heard = True
        interrupts.check()
        printer.part(text)

    printer.heading(items.rows, question.text)
    try:
        answer = session.answer(items.rows, question, earlier=items.earlier, on_text=hear)
    except BaseException:
        if heard:  # what is said next begins on a line of its own
            with suppress(DiskError, ReaderGone):  # the terminal is gone, and has ended it: by a signal, perhaps
                printer.end_of_answer()
        raise
    printer.end_of_answer()
    return answer


def survey_into_table(session: Session, results: Results, table: Table, *, whole_store: bool) -> None:
    """Ask what the table does not know, and put it in; a `whole_store` tells what is out of date."""
    from qvsplit.output.wide import write_wide

    with table:
        with interrupts.at_once():  # the fingerprint of the weights takes its time, once
            recorder = session.recorder(table, results.plan.questions)
        if results.plan.items:
            run_survey(session, results, recorder)
        if results.plan.has_checks:
            for row in results.plan.failed:
                recorder.put_failed(row, failure_reason(row), results.plan.questions)
        recorder.drop_failed()
        if whole_store:
            recorder.drop_stale()
        if results.outputs.wide is not None:  # of what was asked now, as the verdicts on stdout are
            of_now = [record for record in table if record["id"] in recorder.runs]
            write_wide(of_now, results.outputs.wide, recorder.runs)
    if not results.outputs.quiet:
        place = escaped(str(results.outputs.table))
        say(f"{recorder.recalled:,} answers known, {recorder.asked:,} asked; {len(table):,} in {place}")


def failed_into_table(
    store: Collection, options: AskOptions, results: Results, table: Table, *, whole_store: bool
) -> None:
    """Put into the table that none of the selected items could be asked about. Loads no model."""
    from qvsplit.ask import load_session

    if store.provenance is None:  # files beside no store, none of which could be encoded
        if not results.outputs.quiet:
            place = escaped(str(results.outputs.table))
            say_note(f"{place} is as it was: no model is known that could have been asked")
        return
    session = load_session(store, options, loaded=False)
    survey_into_table(session, results, table, whole_store=whole_store)


def write_page(file: Path, results: Results, facts: dict[str, str]) -> None:
    """Write the report, with `facts` about it at its head."""
    from qvsplit.output.report import write_report

    failed = results.plan.failed
    rows = {(row.key, row.part): row for items in results.plan.items for row in items.rows}
    rows |= {(row.key, row.part): row for row in failed}
    with results.progress as progress:
        progress.start("thumbnails", len(rows))
        facts = facts | {"asked": time.strftime("%Y-%m-%d %H:%M")}
        write_report(
            file, results.answers, failed=failed, title=file.stem, facts=facts, on_item=progress.advance,
            worded=on_command_line,
        )  # fmt: skip
    if not results.outputs.quiet:
        say(f"{escaped(str(file))}: {count_rows(rows.values())}, {size(file.stat().st_size)}")
