"""How rows are named and counted: of a video in several parts, which part, and which seconds."""

from __future__ import annotations

import json

import pytest

from qvsplit.output.names import count_rows, names_of, shown_name, timestamp, without_time_span
from qvsplit.output.printer import AnswerPrinter, PrintOptions
from qvsplit.output.verdicts import ItemVerdict, verdict_on_failed
from tests.support import rows
from tests.support.report_pages import generated

IMAGE = rows.row("a.jpg")
WHOLE = rows.row("whole.mp4", kind="video", duration=62.0)
PART = rows.row("in/film.mp4", kind="video", duration=72.5, part=1, start=10.0, end=20.0)
FIRST = rows.row("in/film.mp4", kind="video", duration=72.5, part=0, start=0.0, end=10.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (7.5, "0:07.5"), (10.04, "0:10"), (59.96, "1:00"), (600, "10:00"), (3725, "1:02:05")],
)
def test_times(seconds, text):
    assert timestamp(seconds) == text


def test_a_part_is_shown_with_its_seconds():
    assert [shown_name(row) for row in (IMAGE, WHOLE, FIRST, PART)] == [
        "a.jpg", "whole.mp4", "in/film.mp4#0 (0:00 to 0:10)", "in/film.mp4#1 (0:10 to 0:20)",
    ]  # fmt: skip
    assert shown_name(PART, with_root=True) == "/photos/in/film.mp4#1 (0:10 to 0:20)"
    assert without_time_span(shown_name(PART)) == PART.name == "in/film.mp4#1"
    assert without_time_span("holiday (10 to 12)/b.jpg") == "holiday (10 to 12)/b.jpg"


def test_programs_get_part_and_seconds_of_videos_alone():
    assert names_of([IMAGE]) == {"file": "/photos/a.jpg", "path": "a.jpg", "root": "/photos"}
    assert names_of([PART]) == {
        "file": "/photos/in/film.mp4", "path": "in/film.mp4", "root": "/photos", "kind": "video", "part": 1, "start": 10.0, "end": 20.0
    }  # fmt: skip
    assert names_of([IMAGE, PART]) == {
        "files": ["/photos/a.jpg", "/photos/in/film.mp4"],
        "paths": ["a.jpg", "in/film.mp4"], "roots": ["/photos", "/photos"], "kinds": ["image", "video"],
        "parts": [0, 1], "starts": [None, 10.0], "ends": [None, 20.0],
    }  # fmt: skip


def test_rows_are_counted_by_kind():
    assert count_rows([]) == "0 images"
    assert count_rows([IMAGE]) == "1 image"
    assert count_rows([WHOLE]) == "1 video"
    assert count_rows([FIRST, PART]) == "2 clips of 1 video"
    assert count_rows([IMAGE, FIRST, PART, WHOLE]) == "1 image and 3 clips of 2 videos"


def test_lines_and_verdicts_say_which_part(capsys):
    printer = AnswerPrinter(PrintOptions("tsv"))
    printer.answer(generated(PART, "What?", "A cat."))
    printer.answer(generated((IMAGE, PART), "What differs?", "All."))
    printer.verdict(ItemVerdict((PART,), "pass"))
    assert [line.split("\t") for line in capsys.readouterr().out.splitlines()] == [
        ["answer", "/photos/in/film.mp4", "1", "What?", "A cat.", "", "", ""],
        ["answer", "/photos/a.jpg,/photos/in/film.mp4", ",1", "What differs?", "All.", "", "", ""],
        ["verdict", "/photos/in/film.mp4", "1", "", "", "", "pass", ""],
    ]
    printer = AnswerPrinter(PrintOptions("text"))
    printer.answer(generated((IMAGE, PART), "What differs?", "All."))
    assert capsys.readouterr().out == "\na.jpg, in/film.mp4#1 (0:10 to 0:20)  What differs?\nAll.\n"
    printer = AnswerPrinter(PrintOptions("jsonl"))
    printer.answer(generated(PART, "What?", "A cat."))
    printer.verdict(verdict_on_failed(rows.failed("torn.mp4", kind="video")))
    answer, verdict = map(json.loads, capsys.readouterr().out.splitlines())
    assert (answer["path"], answer["part"], answer["start"], answer["end"]) == ("in/film.mp4", 1, 10.0, 20.0)
    assert (verdict["kind"], verdict["start"], verdict["verdict"]) == ("video", None, "error")
