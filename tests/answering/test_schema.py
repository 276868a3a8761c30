"""Answers that conform to a JSON schema, from a model that would never write one."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from qvsplit.answering.checks import Question
from qvsplit.answering.requests import PromptItems
from qvsplit.answering.schema import Follower, read_schema
from qvsplit.errors import RequestError, UsageError
from tests.support.every_model import further
from tests.support.fake_engine import session_of, store_of
from tests.support.full_model import upright_rgb

SCHEMA = {
    "type": "object",
    "properties": {
        "place": {"enum": ["sea", "city", "mountains"]},
        "people": {"type": "integer", "minimum": 0, "maximum": 20},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "minItems": 1, "maxItems": 2},
    },
    "required": ["place", "people", "tags"],
    "additionalProperties": False,
}


def conforms(text):
    content = json.loads(text)
    assert list(content) == ["place", "people", "tags"]
    assert content["place"] in SCHEMA["properties"]["place"]["enum"]
    assert isinstance(content["people"], int)
    assert 0 <= content["people"] <= 20
    assert 1 <= len(content["tags"]) <= 2
    assert all(isinstance(tag, str) and len(tag) <= 6 for tag in content["tags"])


@pytest.fixture(scope="module")
def store(whole, photos):
    names = ("chelsea.png", "coffee.png", "coins.png", "rocket.jpg")
    return store_of(whole, {name: upright_rgb(photos / name) for name in names})


@pytest.mark.parametrize("images", [2, pytest.param(4, marks=further)])
@pytest.mark.parametrize("more", [{}, {"temperature": 3.0}])
def test_answers_conform_greedy_and_drawn_one_by_one_and_as_a_batch(store, checkpoint, more, images):
    rows = list(store)[:images]
    asked = ["What is it?", "Describe the image in one sentence, please, if you can.", "?"]
    session = session_of(store, checkpoint, json_schema=SCHEMA, max_new_tokens=200, **more)
    for row in rows:
        together = session.answers(row, asked)
        assert [answer.text for answer in together] == [session.answer(row, question).text for question in asked]
        for answer in together:
            assert answer.finish_reason == "stop"
            conforms(answer.text)
    free = session_of(store, checkpoint, max_new_tokens=20).answer(rows[0], asked[0])
    with pytest.raises(json.JSONDecodeError):
        json.loads(free.text)


@pytest.mark.parametrize("rule", [{"no_repeat_ngram_size": 2}, {"min_new_tokens": 60}, {"repetition_penalty": 3.0}])
def test_the_schema_holds_against_a_checkpoints_own_rules(store, checkpoint, tmp_path, rule):
    shutil.copytree(checkpoint, tmp_path / "own")
    file = tmp_path / "own" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | rule))
    for more in ({}, {"temperature": 2.0}):
        session = session_of(store, tmp_path / "own", json_schema=SCHEMA, max_new_tokens=200, **more)
        for answer in session.answers(next(iter(store)), ["?", "What is it?"]):
            assert answer.finish_reason == "stop"
            conforms(answer.text)


def test_an_answer_that_is_cut_says_so(store, checkpoint):
    answer = session_of(store, checkpoint, json_schema=SCHEMA, max_new_tokens=3).answer(next(iter(store)), "?")
    assert answer.finish_reason == "length"


def test_an_answer_that_leaves_its_schema_is_that_answers_error():
    class Refuses:
        def consume_token(self, token):
            return False

        def get_error(self):
            return "no such token"

    with pytest.raises(RequestError, match=r"left its JSON schema \(no such token\)"):
        Follower(Refuses()).take(5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON schema can be read"),
        ("[1]", "is an object"),
        (None, "no JSON schema can be read"),
        pytest.param("[" * 200_000, "no JSON schema can be read", id="nested"),
    ],
)
def test_a_file_that_is_no_schema(tmp_path, text, said):
    file = tmp_path / "schema.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=said):
        read_schema(file)


def test_a_schema_that_cannot_be_followed(store, checkpoint):
    session = session_of(store, checkpoint, json_schema={"type": "no such type"})
    with pytest.raises(UsageError, match="cannot be followed"):
        session.answer(next(iter(store)), "?")
    with pytest.raises(UsageError, match="cannot be followed"):  # no question's own error: none could be answered
        list(session.survey([PromptItems((row,)) for row in store], [Question("?")]))


def test_without_the_library_it_says_what_to_install(store, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match=r"pip install 'qvsplit\[json\]'"):
        session_of(store, checkpoint, json_schema=SCHEMA).answer(next(iter(store)), "?")
