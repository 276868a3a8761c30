"""Answers as batch tools have them: one name an answer, and lines that their readers take."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qvsplit.output.batch_form import batch_line, custom_id
from tests.support.answer_records import answer, check, failed, skipped


def pair(*paths: str, **more: Any) -> dict[str, Any]:
    items = [{"root": "/r", "path": path, "kind": "image", "part": 0, "start": None, "end": None} for path in paths]
    return answer(json.dumps(paths), items=items, part=None, **more)


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (answer("cats/a.jpg", "dog"), "/r//cats/a.jpg|dog"),
        (answer("film.mp4", "dog", part=2, start=5.0, end=7.5), "/r//film.mp4#2|dog"),
        (answer("film.mp4", "dog", part=0, start=0.0, end=2.5), "/r//film.mp4#0|dog"),
        (answer("a#1|b+c%.jpg", "a|b"), "/r//a%231%7Cb%2Bc%25.jpg|a%7Cb"),
        (pair("a.jpg", "b.jpg"), "/r//a.jpg+/r//b.jpg|caption"),
        (answer("a.jpg", "Is it?", root="/"), "///a.jpg|Is it?"),
    ],
)
def test_an_answer_is_named_by_items_and_question(record, name):
    assert custom_id(record) == name
    assert custom_id(record, with_run=True) == f"{name}|one"


NAMES = st.text("a/#|+%", min_size=1, max_size=5)
PATHS = NAMES.filter(lambda path: not path.startswith("/") and not path.endswith("/"))
ROOTS = NAMES.map(lambda root: "/" + root.strip("/"))


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(ROOTS, PATHS, st.integers(0, 1), NAMES, st.sampled_from("ab")), min_size=2, max_size=30))
@example([("/a", "b//x80", 0, "q", "a"), ("/a//b", "x80", 0, "q", "a")])  # a byte beyond UTF-8, as it is stored
@example([("/a", "b#1", 0, "q", "a"), ("/a", "b", 1, "q", "a")])
@example([("/a", "b", 0, "q|a", "b"), ("/a", "b", 0, "q", "a|b")])
def test_no_two_answers_have_one_name(places):
    named: dict[str, Any] = {}
    for place in places:
        root, path, part, name, run = place
        record = answer(path, name, root=root, part=part, start=float(part), run=run)
        assert named.setdefault(custom_id(record, with_run=True), place) == place
        assert named.setdefault(custom_id(record), place[:-1]) == place[:-1]


def test_a_line_is_a_chat_completion():
    line = batch_line(answer("a.jpg", text="A dog.", reasoning="Is it?", at=7))
    body = line["response"]["body"]
    assert line["custom_id"] == "/r//a.jpg|caption"
    assert line["response"]["status_code"] == 200
    assert line["error"] is None
    assert body["object"] == "chat.completion"
    assert (body["model"], body["created"]) == ("demo", 1767225607)
    assert body["choices"] == [{
        "index": 0, "message": {"role": "assistant", "content": "A dog.", "reasoning_content": "Is it?"},
        "logprobs": None, "finish_reason": "stop",
    }]  # fmt: skip
    assert body["usage"] == {"prompt_tokens": 40, "completion_tokens": 2, "total_tokens": 42}


def test_a_choice_is_the_content_and_an_empty_answer_is_one():
    scored = batch_line(check("a.jpg", verdict="block"))["response"]["body"]["choices"][0]
    assert (scored["message"], scored["finish_reason"]) == ({"role": "assistant", "content": "yes"}, "stop")
    cut = batch_line(answer("a.jpg", text="", finish_reason="length"))["response"]["body"]["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == ("", "length")


def test_what_has_no_answer_has_an_error():
    line = batch_line(failed("a.jpg"))
    assert (line["response"], line["error"]) == (None, {"code": "error", "message": "no memory"})
    line = batch_line(skipped("a.jpg"))
    assert (line["response"], line["error"]["code"]) == (None, "skipped")


def test_ids_are_of_the_answer_alone():
    one, again, other = (batch_line(answer("a", run=run)) for run in ("one", "one", "two"))
    assert one == again
    assert one["custom_id"] == other["custom_id"]
    assert one["id"] != other["id"]
