"""Questions to requests: what each carries, and what comes back."""

from __future__ import annotations

import pickle

import pytest

from qvsplit.answering.checks import Question
from qvsplit.answering.options import AskOptions
from qvsplit.answering.requests import PromptItems, Questioner
from qvsplit.errors import UsageError
from tests.support.fake_engine import FakeEngine, row

ITEMS = PromptItems((row("a.jpg"),))
FREE = Question("What is it?")
CHECK = Question("Is it?", choices=["yes", "no"])


def asked(options, question=FREE, rule=lambda request: "yes"):
    engine = FakeEngine(rule)
    (one,) = Questioner(engine, options).ask([(ITEMS, question)])
    return engine.requests[0], one.answer


def test_requests_that_differ_in_thinking_alone_are_told_apart():
    off, _ = asked(AskOptions(temperature=1.0))
    on, _ = asked(AskOptions(temperature=1.0, thinking=True))
    assert (off.thinking, on.thinking) == (False, True)
    assert off.seed != on.seed
    assert off.decoding != on.decoding  # they share no batch
    assert pickle.loads(pickle.dumps(on)) == on


def test_choices_are_scored_without_thinking():
    request, _ = asked(AskOptions(thinking=True), CHECK, lambda request: {"yes": 0.9, "no": 0.1})
    assert request.choices
    assert not request.thinking


def test_reasoning_goes_beside_the_answer():
    _, answer = asked(AskOptions(thinking=True), rule=lambda request: ("Is it a cat?", "A cat."))
    assert (answer.text, answer.reasoning) == ("A cat.", "Is it a cat?")
    _, cut = asked(AskOptions(thinking=True), rule=lambda request: ("Is it a", ""))
    assert (cut.text, cut.is_cut_thought) == ("", True)
    assert asked(AskOptions())[1].reasoning == ""


def test_thinking_is_yes_or_no():
    with pytest.raises(UsageError, match="thinking: give True or False, not str 'yes'"):
        AskOptions(thinking="yes").check()
