"""What a table knows of an answer, and when it is no answer to what is asked now."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qvsplit.answering.checks import Question
from qvsplit.answering.options import AskOptions
from qvsplit.answering.recorder import Origin, Recorder, prompt_hash
from qvsplit.answering.requests import PromptItems
from qvsplit.output.answer import Answer
from qvsplit.output.table import Table
from tests.support.fake_engine import row

ORIGIN = Origin("demo", "config", "weights", "float32")
CHECK = Question("Is it?", "it", choices=["yes", "no"], flag=("yes",))
ITEMS = PromptItems((row("a.jpg"),))
SCORED = Answer(
    ITEMS.rows, CHECK.text, "no", [], 40, "scored", "fingerprint", "it", "warn", False,
    logprobs={"yes": -3.0, "no": -0.1}, probabilities={"yes": 0.05, "no": 0.95},
)  # fmt: skip


@pytest.fixture
def table(tmp_path):
    with Table(tmp_path / "answers.jsonl") as table:
        yield table


def recorder(table, question=CHECK, options=None, current=lambda root, path: None, **origin):
    hashes = {question.name: prompt_hash(question, options or AskOptions())}
    return Recorder(table, replace(ORIGIN, **origin), hashes, current)


def test_an_answer_is_recalled_and_judged_by_the_threshold_of_now(table):
    first = recorder(table)
    first.put(SCORED)
    first.put(SCORED)  # as it is done, and again in its order
    assert (first.asked, first.recalled, first.failed) == (1, 0, 0)
    strict = replace(CHECK, threshold=0.01, level="block")
    answer = recorder(table, strict).recall(ITEMS, strict)
    assert (answer.flagged, answer.level, answer.text) == (True, "block", "no")
    assert answer.recalled is not None


@pytest.mark.parametrize("change", [{"config": "x"}, {"weights": "x"}, {"dtype": "bfloat16"}])
def test_another_origin_is_another_answer(table, change):
    recorder(table).put(SCORED)
    assert recorder(table, **change).recall(ITEMS, CHECK) is None
    assert recorder(table, model="another name").recall(ITEMS, CHECK) is not None


def test_other_bytes_or_another_part_of_them_are_another_answer(table):
    mine = recorder(table)
    mine.put(SCORED)
    assert mine.recall(PromptItems((row("b.jpg"),)), CHECK) is None
    assert mine.recall(PromptItems((row("b.jpg", sha256=ITEMS.rows[0].sha256),)), CHECK) is not None
    assert mine.recall(PromptItems((row("a.jpg", part=1),)), CHECK) is None


def test_an_answer_that_failed_is_recorded_and_asked_again(table):
    failed = replace(SCORED, text="", flagged=None, level=None, logprobs=None, probabilities=None,
                     finish_reason="error", error="no memory")  # fmt: skip
    mine = recorder(table)
    mine.put(failed)
    assert (mine.asked, mine.failed) == (1, 1)
    (record,) = table
    assert (record["answer"], record["finish_reason"], record["error"]) == (None, "error", "no memory")
    assert recorder(table).recall(ITEMS, CHECK) is None
    recorder(table).put(SCORED)
    (record,) = table
    assert (record["answer"], record["error"]) == ("no", None)


def test_reasoning_is_recorded_and_recalled(table):
    plain = replace(SCORED, text="A cat.", finish_reason="stop", flagged=None, level=None, logprobs=None,
                    probabilities=None, reasoning="Is it?")  # fmt: skip
    recorder(table).put(plain)
    assert next(iter(table))["reasoning"] == "Is it?"
    recalled = recorder(table).recall(ITEMS, CHECK)
    assert (recalled.text, recalled.reasoning) == ("A cat.", "Is it?")


def test_an_answer_that_was_cut_short_is_not_recorded(table):
    recorder(table).put(replace(SCORED, finish_reason="cancelled", logprobs=None, probabilities=None))
    assert len(table) == 0


@pytest.mark.parametrize(
    ("now", "is_kept"),
    [
        (ITEMS.rows[0], True),
        (None, True),
        (row("a.jpg", sha256="0" * 64), False),
        (row("a.jpg", status="deleted"), False),
    ],
)
def test_answers_about_other_bytes_are_dropped(table, now, is_kept):
    mine = recorder(table, current=lambda root, path: now)
    mine.put(SCORED)
    mine.drop_stale()
    assert len(table) == is_kept


def test_what_decides_a_prompt():
    plain = Question("Is it?")
    base = prompt_hash(plain, AskOptions())
    changes = [AskOptions(system="x"), AskOptions(max_new_tokens=3), AskOptions(stop=("x",)), AskOptions(top_k=2),
               AskOptions(temperature=1.0), AskOptions(temperature=1.0, seed=1), AskOptions(json_schema={"a": 1}),
               AskOptions(thinking=True)]  # fmt: skip
    assert len({base, *(prompt_hash(plain, options) for options in changes)}) == 1 + len(changes)
    assert prompt_hash(plain, AskOptions(seed=3, device="cpu", token_budget=9)) == base
    scored = prompt_hash(CHECK, AskOptions())
    assert prompt_hash(CHECK, AskOptions(temperature=1.0, max_new_tokens=3, thinking=True)) == scored != base
    assert prompt_hash(replace(CHECK, threshold=0.9, id="other"), AskOptions()) == scored
    assert prompt_hash(replace(CHECK, choices={"yes": ["yes"], "no": ["no", "No"]}), AskOptions()) != scored
