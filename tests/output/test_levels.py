"""The gravest of what was flagged is the verdict, and an error is graver than all."""

from __future__ import annotations

from dataclasses import replace

from qvsplit.output.answer import Answer, verdict_on
from qvsplit.output.levels import ERROR, LEVELS, PASS, VERDICTS, verdict
from tests.support.fake_engine import row


def test_the_gravest_decides():
    assert verdict([]) == PASS == "pass"
    assert verdict(["info", "block", "warn"]) == "block"
    assert verdict(["info"]) == "info"
    assert verdict(["block", ERROR, "info"]) == ERROR == "error"
    assert (PASS, *LEVELS, ERROR) == VERDICTS


def test_an_image_with_an_answer_that_failed_has_no_other_verdict():
    fine = Answer((row(),), "?", "no", [], 1, "scored", "fingerprint", "a", "block", False)
    flagged = replace(fine, id="b", level="warn", flagged=True)
    failed = replace(fine, id="c", flagged=None, level=None, finish_reason="error", error="no memory")
    assert verdict_on([fine]) == "pass"
    assert verdict_on([fine, flagged]) == "warn"
    assert verdict_on([fine, flagged, failed]) == "error"
    assert verdict_on([]) == "pass"
