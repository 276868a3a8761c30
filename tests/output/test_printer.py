"""What answers look like on stdout, and that they cannot do anything else."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from qvsplit.errors import unescaped
from qvsplit.output.answer import Answer
from qvsplit.output.printer import COLUMNS, AnswerPrinter, PrintOptions
from qvsplit.output.verdicts import verdict_on_answers, verdict_on_failed
from qvsplit.store.row import Row

ROW = Row("/photos", "trip/a.jpg", "0" * 64, 10, "ok")
FILE = "/photos/trip/a.jpg"


def answer(text="yes", **more) -> Answer:
    return Answer((ROW,), "Is it so?", text, [1], 9, more.pop("finish_reason", "stop"), "fingerprint", **more)


def scored(yes: float, **more) -> Answer:
    probabilities, logprobs = {"yes": yes, "no": 1 - yes}, {"yes": -0.5, "no": -1.5}
    return answer(probabilities=probabilities, logprobs=logprobs, finish_reason="scored", **more)


def printer(format="tsv", *, single=False, one_root=True, **more) -> AnswerPrinter:
    return AnswerPrinter(PrintOptions(format, **more), single=single, one_root=one_root)


def lines(capsys) -> list[list[str]]:
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("text", ["می‌خواهم", "👩‍👩‍👧", "é日本", "tab\tline\n"])
def test_answers_in_any_script_are_shown_as_they_are(text, capsys):
    printer("text", single=True).part(text)
    assert capsys.readouterr().out == text


def test_an_answer_cannot_take_over_the_terminal(capsys):
    printer("text", single=True).part("\x1b]0;title\x07 \u202eright to left\u2028")
    assert capsys.readouterr().out == "\\x1b]0;title\\x07 \\u202eright to left\\u2028"


@pytest.mark.parametrize("single", [False, True])
def test_reasoning_is_no_part_of_plain_output(capsys, single):
    for format in ("text", "tsv"):
        printer(format, single=single).answer(answer("A cat.", reasoning="Let me see"))
        out = capsys.readouterr().out
        assert "A cat." in out
        assert "Let me see" not in out
    printer("jsonl").answer(answer("A cat.", reasoning="Let me see"))
    assert json.loads(capsys.readouterr().out)["reasoning"] == "Let me see"


def test_tab_separated_lines_have_the_same_columns_whatever_there_is(capsys):
    several = printer(logprobs=True, one_root=False)
    several.answer(answer("a\thouse\nby the sea"))
    several.answer(scored(0.75, flagged=True, level="warn", id="dog"))
    several.answer(scored(0.75, flagged=None, uncertain=True, id="dog"))
    several.answer(answer("", finish_reason="skipped", id="gun"))
    several.answer(answer("", finish_reason="error", error="no memory", id="real"))
    several.answer(replace(answer("All."), rows=(replace(ROW, path="a,b.jpg"), ROW)))
    several.verdict(verdict_on_answers([scored(0.75, flagged=True, level="warn", id="dog")]))
    assert lines(capsys) == [
        ["answer", FILE, "", "Is it so?", "a house by the sea", "", "", ""],
        ["answer", FILE, "", "dog", "yes", "0.75", "warn", "yes=-0.5000 no=-1.5000"],
        ["answer", FILE, "", "dog", "yes", "0.75", "uncertain", "yes=-0.5000 no=-1.5000"],
        ["answer", FILE, "", "gun", "", "", "", "skipped"],
        ["answer", FILE, "", "real", "", "", "error", "no memory"],
        ["answer", f"/photos/a\\x2cb.jpg,{FILE}", "", "Is it so?", "All.", "", "", ""],
        ["verdict", FILE, "", "", "", "", "warn", "dog"],
    ]
    printer(single=True, one_root=True).answer(answer("a house"))
    assert lines(capsys) == [["answer", FILE, "", "Is it so?", "a house", "", "", ""]]
    assert len(COLUMNS) == 8


def test_paths_open_from_where_the_command_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "-rf.jpg"):
        (tmp_path / "photos" / name).write_text("x")
        row = replace(ROW, root=str(tmp_path / "photos"), path=name)
        for one in (printer(), printer(absolute=True)):
            one.answer(replace(answer(), rows=(row,)))
    printed = [Path(line[1]) for line in lines(capsys)]
    assert all(path.is_file() for path in printed)
    assert [path.is_absolute() for path in printed] == [False, True] * 2
    monkeypatch.chdir(tmp_path / "photos")
    printer().answer(replace(answer(), rows=(row,)))
    assert lines(capsys)[0][1] == "./-rf.jpg"  # no command takes it for an option
    printer("jsonl").answer(replace(answer(), rows=(row,)))
    assert json.loads(capsys.readouterr().out)["file"] == "./-rf.jpg"
    monkeypatch.chdir("/")
    printer().answer(replace(answer(), rows=(row,)))
    assert lines(capsys)[0][1] == str(tmp_path / "photos" / "-rf.jpg")


@pytest.mark.parametrize(
    "name", ["a  b.jpg", "v\u00a013.jpg", "at 8.55\u202fPM.jpg", "家族\u3000写真.jpg", " a .jpg", "a\\b.jpg"]
)
def test_a_path_is_the_path_of_the_file(name, capsys):
    named = replace(answer(), rows=(replace(ROW, path=name),))
    printer().answer(named)
    printer().verdict(verdict_on_answers([named]))
    assert [line[1] for line in lines(capsys)] == [f"/photos/{name}"] * 2
    printer("text").verdict(verdict_on_answers([named]))
    assert capsys.readouterr().out == f"{name}  pass\n"


def test_a_path_that_cannot_be_printed_is_escaped_so_that_it_can_be_turned_back(capsys):
    names = ["a\tb", "a\nb", "a\x1b[31mb", "a\\x1b[31mb", "a\u202eb", "a\u2028b"]
    for name in names:
        printer().answer(replace(answer(), rows=(replace(ROW, root="/", path=name),)))
    printed = [line[1] for line in lines(capsys)]
    assert printed == ["/a\\x09b", "/a\\x0ab", "/a\\x1b[31mb", "/a\\x5cx1b[31mb", "/a\\u202eb", "/a\\u2028b"]
    assert [unescaped(one)[1:] for one in printed] == names


def test_paths_of_what_did_not_pass_once_each(capfdbinary):
    torn = replace(ROW, path="b\n//xff.jpg", status="failed", error="is torn")
    clips = [replace(ROW, path="film.mp4", kind="video", part=part, start=0.0, end=1.0) for part in (1, 2)]
    items = [verdict_on_failed(torn), verdict_on_answers([scored(0.1, flagged=False)])]
    items += [verdict_on_answers([replace(scored(0.9, flagged=True, level="info"), rows=(clip,))]) for clip in clips]
    items.append(verdict_on_answers([scored(0.9, uncertain=True)]))
    for format, wanted in (
        ("paths0", b"/photos/b\n\xff.jpg\0/photos/film.mp4\0/photos/trip/a.jpg\0"),
        ("paths", b"/photos/b\\x0a\\udcff.jpg\n/photos/film.mp4\n/photos/trip/a.jpg\n"),
    ):
        one = printer(format)
        one.answer(scored(0.9))
        for item in items:
            one.verdict(item)
        assert capfdbinary.readouterr().out == wanted


def test_json_has_a_name_that_is_not_utf_8(capsys):
    named = replace(answer(), rows=(replace(ROW, path="//xff.jpg"),))
    printer("jsonl").answer(named)
    line = json.loads(capsys.readouterr().out)
    assert (line["path"], os.fsencode(line["file"])) == ("//xff.jpg", b"/photos/\xff.jpg")


def test_for_people_the_root_where_there_are_several(capsys):
    printer("text", one_root=False).answer(answer())
    assert capsys.readouterr().out == "\n/photos/trip/a.jpg  Is it so?\nyes\n"
    printer("text").answer(scored(0.9, id="dog", flagged=True, level="warn"))
    assert capsys.readouterr().out == "\ntrip/a.jpg  dog\nyes  0.900  warn\n"
    printer("text").answer(scored(0.9, id="dog", uncertain=True))
    assert "uncertain: it would rather have said something else (choice mass 8.3e-01)" in capsys.readouterr().out


def test_for_people_the_text_alone_where_there_is_one_answer(capsys):
    printer("text", single=True).answer(answer("a house"))
    assert capsys.readouterr().out == "a house\n"


def test_the_format_is_text_on_a_terminal_alone(monkeypatch):
    assert PrintOptions().chosen == "tsv"
    monkeypatch.setattr("qvsplit.output.printer.is_terminal", lambda stream: True)
    assert PrintOptions().chosen == "text"
    assert PrintOptions("paths0").chosen == "paths0"


def test_verdicts(capsys):
    flagged = scored(1.0, flagged=True, level="block", id="dog")
    failed = answer("", finish_reason="error", error="no memory", id="gun")
    for item in ([flagged], [flagged, failed], [answer()]):
        printer().verdict(verdict_on_answers(item))
    assert [line[6:] for line in lines(capsys)] == [["block", "dog"], ["block", "dog; no memory"], ["pass", ""]]
    printer("jsonl").verdict(verdict_on_answers([flagged]))
    assert json.loads(capsys.readouterr().out) == {
        "type": "verdict", "file": FILE, "path": "trip/a.jpg", "root": "/photos", "verdict": "block",
        "flagged": ["dog"], "uncertain": [],
    }  # fmt: skip


def test_people_are_told_a_reason_in_other_words_and_programs_as_it_is_stored(capsys):
    """A command names its own flag; a row keeps Python's name."""
    failed = answer(text="", error="`limit` allows more")
    item = verdict_on_failed(replace(ROW, status="failed", error="`limit` allows more"))
    for format, name in (("text", "--limit"), ("tsv", "`limit`"), ("jsonl", "`limit`")):
        one = printer(format, worded=lambda text: text.replace("`limit`", "--limit"))
        one.answer(failed)
        one.verdict(item)
        assert capsys.readouterr().out.count(f"{name} allows more") == 2
