"""The gate over all items: it fails closed."""

from __future__ import annotations

import pytest

from qvsplit.errors import UsageError
from qvsplit.output.answer import Answer
from qvsplit.output.levels import LEVELS
from qvsplit.output.verdicts import check_level, count_line, trips, verdict_on_answers, verdict_on_failed
from qvsplit.store.row import Row

ROW = Row("/photos", "a.jpg", "0" * 64, 10, "ok")
BROKEN = Row("/photos", "broken.jpg", "1" * 64, 10, "failed", error="is a JPEG file that is cut off or damaged")


def answer(id: str, *, level: str | None = None, flagged: bool | None = None, error: str | None = None) -> Answer:
    return Answer(
        (ROW,), "?", "", [], 0, "error" if error else "scored", "fingerprint", id, level, flagged, error=error
    )


@pytest.mark.parametrize("level", LEVELS)
def test_a_failed_item_trips_the_gate_at_every_level(level):
    item = verdict_on_failed(BROKEN)
    assert trips([item], level)
    assert item.to_json() == {
        "path": "broken.jpg", "root": "/photos", "verdict": "error",
        "error": "is a JPEG file that is cut off or damaged",
    }  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
def test_a_question_that_was_not_answered_trips_the_gate_at_every_level(level):
    item = verdict_on_answers([
        answer("dog", level="info", flagged=False), answer("gun", error="the features are damaged")
    ])  # fmt: skip
    assert (item.verdict, item.error) == ("error", "the features are damaged")
    assert trips([item], level)


def test_an_error_is_graver_than_any_flag_and_hides_none():
    item = verdict_on_answers([answer("dog", level="block", flagged=True), answer("gun", error="no memory")])
    assert item.to_json() == {
        "path": "a.jpg", "root": "/photos", "verdict": "error", "flagged": ["dog"], "error": "no memory"
    }  # fmt: skip


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


def test_a_level_that_does_not_exist():
    with pytest.raises(UsageError, match="choose one of info, warn, block"):
        check_level("fatal")
    with pytest.raises(UsageError):
        check_level("error")
