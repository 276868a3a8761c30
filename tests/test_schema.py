"""Answers that conform to a JSON schema, from a model that would never write one."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from qvsplit.album import open_album
from qvsplit.ask import Settings, open_asker
from qvsplit.errors import UsageError
from qvsplit.schema import read_schema

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
    told = json.loads(text)
    assert list(told) == ["place", "people", "tags"]
    assert told["place"] in SCHEMA["properties"]["place"]["enum"]
    assert isinstance(told["people"], int)
    assert 0 <= told["people"] <= 20
    assert 1 <= len(told["tags"]) <= 2
    assert all(isinstance(tag, str) and len(tag) <= 6 for tag in told["tags"])


@pytest.mark.parametrize("more", [{}, {"temperature": 3.0}])
def test_answers_conform_greedy_and_drawn_one_by_one_and_as_a_batch(album_folder, more):
    album = open_album(album_folder)
    rows = list(album)[:4]
    asked = ["What is it?", "Describe the picture in one sentence, please, if you can.", "?"]
    asker = open_asker(album, Settings(json_schema=SCHEMA, max_new_tokens=200, **more))
    for row in rows:
        together = asker.answers(row, asked)
        assert [answer.text for answer in together] == [asker.answer(row, question).text for question in asked]
        for answer in together:
            assert answer.finish_reason == "stop"
            conforms(answer.text)
    free = open_asker(album, Settings(max_new_tokens=20)).answer(rows[0], asked[0])
    with pytest.raises(json.JSONDecodeError):
        json.loads(free.text)


@pytest.mark.parametrize("rule", [{"no_repeat_ngram_size": 2}, {"min_new_tokens": 60}, {"repetition_penalty": 3.0}])
def test_the_schema_holds_against_a_checkpoints_own_rules(album_folder, checkpoint, tmp_path, rule):
    shutil.copytree(checkpoint, tmp_path / "own")
    file = tmp_path / "own" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | rule))
    album = open_album(album_folder)
    for more in ({}, {"temperature": 2.0}):
        settings = Settings(model=str(tmp_path / "own"), json_schema=SCHEMA, max_new_tokens=200, **more)
        for answer in open_asker(album, settings).answers(next(iter(album)), ["?", "What is it?"]):
            assert answer.finish_reason == "stop"
            conforms(answer.text)


def test_an_answer_that_is_cut_says_so(album_folder):
    album = open_album(album_folder)
    answer = open_asker(album, Settings(json_schema=SCHEMA, max_new_tokens=3)).answer(next(iter(album)), "?")
    assert answer.finish_reason == "length"


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "no JSON schema can be read"), ("[1]", "is an object"), (None, "no JSON schema can be read")],
)
def test_a_file_that_is_no_schema(tmp_path, text, said):
    file = tmp_path / "schema.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=said):
        read_schema(file)


def test_a_schema_that_cannot_be_followed(album_folder):
    album = open_album(album_folder)
    asker = open_asker(album, Settings(json_schema={"type": "no such type"}))
    with pytest.raises(UsageError, match="cannot be followed"):
        asker.answer(next(iter(album)), "?")


def test_without_the_library_it_says_what_to_install(album_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    album = open_album(album_folder)
    with pytest.raises(UsageError, match=r"pip install 'qvsplit\[json\]'"):
        open_asker(album, Settings(json_schema=SCHEMA)).answer(next(iter(album)), "?")
