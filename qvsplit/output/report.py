"""Answers as one HTML page for people: images, frames of videos, answers, filters, sorting.

The page is one file that loads nothing from anywhere: images are thumbnails within it, and its policy lets nothing but
its own script and style run. It appears under its name whole or not at all. It grows on disk as answers come; in
memory are the texts of the answers and a few pictures. Knows nothing of models: no torch.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from qvsplit.errors import UsageError
from qvsplit.output.levels import ERROR, PASS, VERDICTS, verdict
from qvsplit.output.thumbnails import Thumbnails, shown_text
from qvsplit.output.verdicts import failure_reason
from qvsplit.runtime.atomic_files import disk_errors, written_whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qvsplit.output.answer import Answer
    from qvsplit.store.row import Key, Row

MARK = b'<meta name="generator" content="qvsplit">'
# What an answer's third number says, added up
FLAGGED, CUT, SKIPPED, UNCERTAIN, FAILED = 1, 2, 4, 8, 16
SCORES = 4  # verdict, probabilities, log-probabilities, choice mass
_THUMBNAILS, _DATA = "<!-- thumbnails -->", "<!-- data -->"


def write_report(
    file: Path,
    answers: Iterable[Answer],
    *,
    title: str,
    facts: Mapping[str, str],
    failed: Sequence[Row] = (),
    on_item: Callable[[str], None] = lambda path: None,
    worded: Callable[[str], str] = str,
) -> None:
    """Write the page of `answers` to `file`; what is there stays until the new page is whole.

        qvsplit.write_report(Path("album.html"), answers, title="Album", facts={"model": session.model})

    Args:
        file: Ends in .html; a file that is there is replaced only if it is such a page.
        answers: Consecutive answers about the same items are one card; each part of a video is an item of its own.
        title: The page's heading.
        facts: Lines below it: where the answers come from.
        failed: Items that could not be encoded. Each is a card with the verdict `error`, ahead of the others.
        on_item: Called with the name of each item once its thumbnail, or the reason why there is none, is known.
        worded: How the page says why there is no answer, or no thumbnail: given the reason as it is stored.

    Raises:
        UsageError: No page can be at `file`.
        DiskError: The disk is full or cannot be written. Both before the first answer is taken, where that can be
            known by then.
    """
    before, between, after = _template(title)
    target = _checked_target(file)
    with _disk_errors(target), written_whole(target) as stream:

        def write(text: str) -> None:
            stream.write(text.encode())

        write(before)
        cards = _Cards(worded)
        with Thumbnails(write, on_item, worded) as thumbnails:
            for row in failed:
                cards.add_failed(row, thumbnails.number(row))
            for answer in answers:
                cards.add(answer, [thumbnails.number(row) for row in answer.rows])
            items = thumbnails.finish()
        write(between)
        write('<script type="application/json" id="data">')
        for part in cards.to_json(title, facts, items):
            write(part)
        write("</script>")
        write(after)


def check_target(file: Path) -> None:
    """Raise UsageError or DiskError if no page could be written to `file`: before the first question is asked."""
    target = _checked_target(file)
    with _disk_errors(target), TemporaryFile(dir=target.parent):
        pass


def _checked_target(file: Path) -> Path:
    """Give where the page goes, links followed. UsageError if it cannot be there, or something else would be lost."""
    target = Path(os.path.realpath(file))
    if not target.parent.is_dir():
        raise UsageError(f"no folder at {target.parent} for the report")
    if target.exists() and not target.is_file():
        raise UsageError(f"{target} is not a file: the report needs a name of its own")
    if file.suffix.lower() not in {".html", ".htm"}:
        raise UsageError(f"the report {file}: the name must end in .html")
    if target.exists() and target.stat().st_size and not _is_report(target):
        raise UsageError(f"{target} exists and is no report of qvsplit; choose another name")
    return target


def _is_report(file: Path) -> bool:
    with _disk_errors(file), file.open("rb") as stream:
        return MARK in stream.read(1000)


def _disk_errors(file: Path) -> AbstractContextManager[None]:
    return disk_errors(f"the report {file}", kept="", elsewhere="choose another place")


def _template(title: str) -> tuple[str, str, str]:
    """Give the page before its thumbnails, between them and its data, and after. Only its own script may run."""
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    style, script = (re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL) for tag in ("style", "script"))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_source(style[0])}; script-src {_source(script[0])}; "
        "base-uri 'none'; form-action 'none'"
    )
    before, rest = page.split(_THUMBNAILS)
    between, after = rest.split(_DATA)
    before = before.replace("$policy", policy).replace("$title", html.escape(shown_text(title)))
    return before, between, after


def _source(content: str) -> str:
    """Give the name of one inline script or style in a Content Security Policy: its hash."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


# --------------------------------------------------------------------------------------------------------- the data


class _Cards:
    """The page's data, as compact as JSON can be: each text and each question once, else their numbers."""

    def __init__(self, worded: Callable[[str], str]) -> None:
        self._worded = worded
        self._texts: dict[str, int] = {}
        self._questions: dict[tuple[str, str], int] = {}
        self._choices: list[dict[str, int]] = []  # per question: each choice's number
        self._cards: list[str] = []
        self._keys: list[tuple[Key, int]] = []  # of the items of the card that is open, each with its part
        self._items: Sequence[int] = ()
        self._answers: list[list[Any]] = []
        self._verdicts: list[str] = []  # on its answers; none where nothing could be flagged

    def add_failed(self, row: Row, item: int) -> None:
        """Add a card for an item that could not be encoded."""
        reason = self._number(self._worded(failure_reason(row)))
        self._cards.append(_json([[item], VERDICTS.index(ERROR), [], reason]))

    def add(self, answer: Answer, items: Sequence[int]) -> None:
        """Add one answer about the items of these numbers: to the open card, or to a new one if they are others."""
        keys = [(row.key, row.part) for row in answer.rows]
        if keys != self._keys:
            self._close()
            self._keys, self._items = keys, items
        question = self._questions.setdefault((answer.id, answer.question), len(self._questions))
        if question == len(self._choices):
            self._choices.append({})
        self._verdicts += [answer.verdict] if answer.verdict is not None else []
        text = answer.text if answer.error is None else self._worded(answer.error)
        scores = self._scores(question, answer)
        if answer.reasoning:
            scores += [*[None] * (SCORES - len(scores)), self._number(answer.reasoning)]
        self._answers.append([question, self._number(text), _marks(answer), *scores])

    def _number(self, text: str) -> int:
        return self._texts.setdefault(shown_text(text), len(self._texts))

    def _scores(self, question: int, answer: Answer) -> list[Any]:
        """Give the verdict's number, probabilities and log-probabilities by choice, and choice mass."""
        if not answer.probabilities:
            return []
        choices = self._choices[question]
        for name in answer.probabilities:
            choices.setdefault(name, self._number(name))
        logprobs = answer.logprobs or {}
        return [
            VERDICTS.index(answer.verdict or PASS),
            [_figure(answer.probabilities.get(name)) for name in choices],
            [_figure(logprobs.get(name)) for name in choices],
            _figure(answer.choice_mass, digits=3),
        ]

    def _close(self) -> None:
        if not self._answers:
            return
        number = VERDICTS.index(verdict(self._verdicts)) if self._verdicts else -1
        self._cards.append(_json([self._items, number, self._answers]))
        self._answers, self._verdicts = [], []

    def to_json(self, title: str, facts: Mapping[str, str], items: Sequence[Sequence[Any]]) -> Iterator[str]:
        """Give all of it as JSON that can stand in a page, in parts."""
        self._close()
        content = {
            "title": shown_text(title),
            "facts": [[shown_text(name), shown_text(value)] for name, value in facts.items()],
            "verdicts": VERDICTS,  # the page has a sign and a colour for each, in this order
            "questions": [
                [shown_text(id), shown_text(question), list(choices.values())]
                for (id, question), choices in zip(self._questions, self._choices, strict=True)
            ],
            "texts": list(self._texts),
            "items": items,
        }
        yield _json(content)[:-1] + ',"cards":['
        for number, card in enumerate(self._cards):
            yield f"{',' if number else ''}\n{card}"
        yield "]}"


def _marks(answer: Answer) -> int:
    if answer.error is not None:
        return FAILED
    reason = answer.finish_reason
    marks = FLAGGED * bool(answer.flagged) + CUT * (reason == "length") + SKIPPED * (reason == "skipped")
    return marks + UNCERTAIN * answer.uncertain


def _figure(value: float | None, *, digits: int = 6) -> float | None:
    """Give as many digits as a page needs; JSON has no infinity."""
    return float(f"{value:.{digits}g}") if value is not None and math.isfinite(value) else None


_UNSAFE = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def _json(content: Any) -> str:
    """Give JSON that ends no script element, whatever is in it."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_UNSAFE)
