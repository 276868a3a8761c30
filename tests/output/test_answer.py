"""One answer as --json prints it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from qvsplit.output.answer import Answer, names_of
from tests.support.fake_engine import row

PLAIN = Answer((row("a.jpg"),), "What?", "A cat.", [1, 2], 40, "stop", "fingerprint")


def test_an_answer_in_the_models_own_words():
    assert json.loads(json.dumps(PLAIN.to_json())) == {
        "type": "answer", "file": "/photos/a.jpg", "path": "a.jpg", "root": "/photos", "question": "What?", "answer": "A cat.", "tokens": [1, 2],
        "prompt_tokens": 40, "finish_reason": "stop", "encoder_check": "fingerprint",
    }  # fmt: skip
    assert (PLAIN.name, PLAIN.choice, PLAIN.choice_probability, PLAIN.choice_mass) == ("What?", None, None, None)
    assert (PLAIN.choice_form, PLAIN.verdict) == (None, None)


def test_reasoning_is_beside_the_answer():
    answer = replace(PLAIN, reasoning="Is it a cat?")
    assert (answer.to_json()["answer"], answer.to_json()["reasoning"]) == ("A cat.", "Is it a cat?")
    assert "reasoning" not in PLAIN.to_json()
    assert not answer.is_cut_thought
    assert not replace(PLAIN, text="", finish_reason="length").is_cut_thought
    assert replace(answer, text="", finish_reason="length").is_cut_thought


def test_an_answer_to_a_check():
    logprobs = {"yes": math.log(0.3), "no": math.log(0.1)}
    answer = replace(
        PLAIN, text="yes", tokens=[], finish_reason="scored", id="cat", level="block", flagged=True, logprobs=logprobs,
        probabilities={"yes": 0.75, "no": 0.25}, score=0.75, forms={"yes": "Yes.", "no": "no"},
    )  # fmt: skip
    record = answer.to_json()
    assert (record["id"], record["flagged"], record["level"], record["score"]) == ("cat", True, "block", 0.75)
    assert (record["choice"], record["choice_probability"], record["choice_form"]) == ("yes", 0.75, "Yes.")
    assert record["verdict"] == "block"
    assert replace(answer, flagged=False, level=None).verdict == "pass"
    assert replace(answer, flagged=None, level=None, uncertain=True).verdict == "uncertain"
    assert replace(answer, error="no memory").verdict == "error"
    assert replace(answer, flagged=None, level=None).verdict is None
    assert record["choice_mass"] == pytest.approx(0.4)
    assert answer.name == "cat"


def test_an_answer_that_failed_and_one_about_several_images():
    answer = replace(PLAIN, rows=(row("a.jpg"), row("b.jpg")), text="", finish_reason="error", error="no memory")
    assert answer.to_json()["error"] == "no memory"
    assert names_of(answer.rows) == {
        "files": ["/photos/a.jpg", "/photos/b.jpg"],
        "paths": ["a.jpg", "b.jpg"],
        "roots": ["/photos", "/photos"],
    }
    assert "error" not in PLAIN.to_json()


def test_an_image_of_which_one_frame_was_looked_at_passes_no_check():
    moving = replace(row("a.gif"), warnings="only the first of its 3 frames was looked at")
    answer = replace(PLAIN, rows=(moving,), id="cat", flagged=False)
    assert answer.verdict == answer.to_json()["verdict"] == "uncertain"
    assert replace(answer, flagged=True, level="warn").verdict == "warn"
    assert replace(answer, flagged=None).verdict is None
    assert replace(answer, rows=PLAIN.rows).verdict == "pass"
