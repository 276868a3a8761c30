"""What answers look like on stdout, and that they cannot do anything else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qvsplit.errors import unescaped
from qvsplit.output.answer import Answer
from qvsplit.output.printer import AnswerPrinter
from qvsplit.output.verdicts import verdict_on_answers
from qvsplit.store.row import Row

ROW = Row("/photos", "trip/a.jpg", "0" * 64, 10, "ok")


def answer(text="yes", **more) -> Answer:
    return Answer((ROW,), "Is it so?", text, [1], 9, more.pop("finish_reason", "stop"), "fingerprint", **more)


def printer(**more) -> AnswerPrinter:
    return AnswerPrinter(**{"as_json": False, "single": False, "one_root": True} | more)


@pytest.mark.parametrize("text", ["می‌خواهم", "👩‍👩‍👧", "é日本", "tab\tline\n"])
def test_answers_in_any_script_are_shown_as_they_are(text, capsys):
    printer(single=True).part(text)
    assert capsys.readouterr().out == text


def test_an_answer_cannot_take_over_the_terminal(capsys):
    printer(single=True).part("\x1b]0;title\x07 \u202eright to left\u2028")
    assert capsys.readouterr().out == "\\x1b]0;title\\x07 \\u202eright to left\\u2028"


@pytest.mark.parametrize("single", [False, True])
def test_reasoning_is_no_part_of_plain_output(capsys, monkeypatch, single):
    for is_terminal in (False, True):
        monkeypatch.setattr("qvsplit.output.printer.is_terminal", lambda stream, it=is_terminal: it)
        printer(single=single).answer(answer("A cat.", reasoning="Let me see"))
        out = capsys.readouterr().out
        assert "A cat." in out
        assert "Let me see" not in out
    printer(as_json=True).answer(answer("A cat.", reasoning="Let me see"))
    assert json.loads(capsys.readouterr().out)["reasoning"] == "Let me see"


def test_lines_for_a_pipe(capsys):
    lines = printer(logprobs=True)
    lines.answer(answer("a\thouse\nby the sea"))
    lines.answer(answer(probabilities={"yes": 0.75, "no": 0.25}, logprobs={"yes": -0.5, "no": -1.5}, flagged=True,
                        level="warn", id="dog"))  # fmt: skip
    lines.answer(answer("", finish_reason="skipped", id="gun"))
    lines.answer(answer("", finish_reason="error", error="no memory", id="real"))
    assert [line.split("\t") for line in capsys.readouterr().out.splitlines()] == [
        ["trip/a.jpg", "Is it so?", "a house by the sea"],
        ["trip/a.jpg", "dog", "yes", "0.750", "warn", "yes=-0.5000", "no=-1.5000"],
        ["trip/a.jpg", "gun", "", "skipped"],
        ["trip/a.jpg", "real", "", "error", "no memory"],
    ]


@pytest.mark.parametrize(
    "name", ["a  b.jpg", "v\u00a013.jpg", "at 8.55\u202fPM.jpg", "家族\u3000写真.jpg", " a .jpg", "a\\b.jpg"]
)
def test_a_path_is_the_path_of_the_file(name, capsys):
    named = replace(answer(), rows=(replace(ROW, path=name),))
    printer().answer(named)
    printer().verdict(verdict_on_answers([named]))
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == [name, name]


def test_a_path_that_cannot_be_printed_is_escaped_so_that_it_can_be_turned_back(capsys):
    names = ["a\tb", "a\nb", "a\x1b[31mb", "a\\x1b[31mb", "a\u202eb", "a\u2028b"]
    for name in names:
        printer().answer(replace(answer(), rows=(replace(ROW, path=name),)))
    printed = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == ["a\\x09b", "a\\x0ab", "a\\x1b[31mb", "a\\x5cx1b[31mb", "a\\u202eb", "a\\u2028b"]
    assert list(map(unescaped, printed)) == names


def test_the_root_where_there_are_several(capsys):
    printer(one_root=False).answer(answer())
    assert capsys.readouterr().out.startswith("/photos/trip/a.jpg\t")


def test_the_text_alone_where_there_is_one_answer(capsys):
    printer(single=True).answer(answer("a house"))
    assert capsys.readouterr().out == "a house\n"


def test_verdicts(capsys):
    flagged = answer(probabilities={"yes": 1.0}, logprobs={"yes": 0.0}, flagged=True, level="block", id="dog")
    failed = answer("", finish_reason="error", error="no memory", id="gun")
    for item in ([flagged], [flagged, failed], [answer()]):
        printer().verdict(verdict_on_answers(item))
    printer(as_json=True).verdict(verdict_on_answers([flagged]))
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split("\t") for line in lines] == [
        ["trip/a.jpg", "verdict", "block", "dog"], ["trip/a.jpg", "verdict", "error", "no memory"],
        ["trip/a.jpg", "verdict", "pass", ""],
    ]  # fmt: skip
    assert json.loads(last) == {"path": "trip/a.jpg", "root": "/photos", "verdict": "block", "flagged": ["dog"]}
