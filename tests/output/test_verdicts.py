"""The gate over all items: it fails closed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qvsplit.errors import UsageError
from qvsplit.output.answer import Answer
from qvsplit.output.levels import LEVELS
from qvsplit.output.verdicts import check_allowed, check_level, count_line, trips, verdict_on_answers, verdict_on_failed
from qvsplit.store.row import Row

ROW = Row("/photos", "a.jpg", "0" * 64, 10, "ok")
BROKEN = Row("/photos", "broken.jpg", "1" * 64, 10, "failed", error="is a JPEG file that is cut off or damaged")


def answer(
    id: str, *, level: str | None = None, flagged: bool | None = None, error: str | None = None, uncertain: bool = False
) -> Answer:
    return Answer(
        (ROW,), "?", "", [], 0, "error" if error else "scored", "fingerprint", id, level if flagged else None, flagged,
        uncertain, error=error,
    )  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
def test_a_failed_item_trips_the_gate_at_every_level(level):
    item = verdict_on_failed(BROKEN)
    assert trips([item], level)
    assert trips([item], level, {"uncertain"})
    assert not trips([item], level, {"error"})
    assert item.to_json() == {
        "type": "verdict", "file": "/photos/broken.jpg", "path": "broken.jpg", "root": "/photos", "verdict": "error",
        "flagged": [], "uncertain": [], "error": "is a JPEG file that is cut off or damaged",
    }  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
def test_a_question_that_was_not_answered_trips_the_gate_at_every_level(level):
    item = verdict_on_answers([
        answer("dog", level="info", flagged=False), answer("gun", error="the features are damaged")
    ])  # fmt: skip
    assert (item.verdict, item.error) == ("error", "the features are damaged")
    assert trips([item], level)


@pytest.mark.parametrize("level", LEVELS)
def test_what_the_model_would_not_have_said_trips_the_gate_at_every_level(level):
    item = verdict_on_answers([answer("dog", flagged=False), answer("event", uncertain=True)])
    assert (item.verdict, item.uncertain, item.reason) == ("uncertain", ("event",), "event")
    assert trips([item], level)
    assert trips([item], level, {"error"})
    assert not trips([item], level, {"uncertain"})


# what the checks of an item come to; the verdict; what trips --fail-on warn: nothing allowed, uncertain, error, both
TRUTH = [
    ((), "pass", (False, False, False, False)),
    (("info",), "info", (False, False, False, False)),
    (("warn",), "warn", (True, True, True, True)),
    (("block",), "block", (True, True, True, True)),
    (("uncertain",), "uncertain", (True, False, True, False)),
    (("error",), "error", (True, True, False, False)),
    (("info", "uncertain"), "uncertain", (True, False, True, False)),
    (("warn", "uncertain"), "uncertain", (True, True, True, True)),
    (("block", "uncertain"), "block", (True, True, True, True)),
    (("info", "error"), "error", (True, True, False, False)),
    (("warn", "error"), "error", (True, True, True, True)),
    (("uncertain", "error"), "error", (True, True, True, False)),
    (("block", "uncertain", "error"), "block", (True, True, True, True)),
]


@pytest.mark.parametrize(("states", "verdict", "tripped"), TRUTH)
def test_the_truth_table(states, verdict, tripped):
    answers = [answer("fine", level="block", flagged=False)]
    for state in states:
        unknown = {"uncertain": {"uncertain": True}, "error": {"error": "no memory"}}
        answers.append(answer(state, **unknown.get(state, {"level": state, "flagged": True})))
    item = verdict_on_answers(answers)
    assert item.verdict == verdict
    allowed = ((), ("uncertain",), ("error",), ("uncertain", "error"))
    assert tuple(trips([item], "warn", some) for some in allowed) == tripped


def test_an_error_hides_no_flag_and_a_flag_no_error():
    item = verdict_on_answers([answer("dog", level="block", flagged=True), answer("gun", error="no memory")])
    assert item.to_json() == {
        "type": "verdict", "file": "/photos/a.jpg", "path": "a.jpg", "root": "/photos", "verdict": "block",
        "flagged": ["dog"], "uncertain": [], "error": "no memory",
    }  # fmt: skip
    assert item.reason == "dog; no memory"


def test_levels_trip_from_theirs_on():
    passed = verdict_on_answers([answer("dog", level="block", flagged=False)])
    warned = verdict_on_answers([answer("dog", level="warn", flagged=True)])
    assert (passed.verdict, warned.verdict) == ("pass", "warn")
    assert passed.to_json()["flagged"] == []
    assert [trips([passed, warned], level) for level in LEVELS] == [True, True, False]
    assert not any(trips([passed], level) for level in LEVELS)
    assert not any(trips([], level) for level in LEVELS)


def test_the_counts_name_every_verdict_the_gravest_first():
    items = [verdict_on_failed(BROKEN), verdict_on_answers([answer("dog", level="warn", flagged=True)])]
    items += [verdict_on_answers([answer("dog", level="warn", flagged=False)])] * 2
    assert count_line(items) == "error: 1, warn: 1, pass: 2"


def test_what_cannot_be_allowed():
    check_allowed(["uncertain", "error"])
    with pytest.raises(UsageError, match="block cannot be allowed; choose uncertain or error"):
        check_allowed(["uncertain", "block"])


def test_a_level_that_does_not_exist():
    with pytest.raises(UsageError, match="choose one of info, warn, block"):
        check_level("fatal")
    with pytest.raises(UsageError):
        check_level("error")


def test_of_what_not_all_was_looked_at_nothing_is_known():
    seen = "only the first of 3 frames was looked at"
    moving = replace(ROW, path="a.gif", warnings=seen)
    item = verdict_on_answers([replace(answer("dog", level="warn", flagged=False), rows=(moving,))])
    assert (item.verdict, item.uncertain, item.reason, item.unseen) == ("uncertain", ("frames",), "frames", seen)
    assert [trips([item], "block", allowed) for allowed in ((), ("error",), ("uncertain",))] == [True, True, False]
    item = verdict_on_answers([replace(answer("dog", level="block", flagged=True), rows=(ROW, moving))])
    assert (item.verdict, item.level, item.reason, item.unseen) == ("block", "block", "dog,frames", seen)
    assert trips([item], "block", {"uncertain"})
    clip = replace(ROW, kind="video", warnings="variable-frame-rate")
    item = verdict_on_answers([replace(answer("dog", flagged=False), rows=(clip,))])
    assert (item.verdict, item.uncertain, item.unseen) == ("pass", (), "")
