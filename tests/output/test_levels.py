"""The gravest is the verdict; what is not known may be anything up to block."""

from __future__ import annotations

from qvsplit.output.levels import LEVELS, PASS, UNKNOWN, VERDICTS, verdict


def test_the_gravest_decides():
    assert verdict([]) == PASS == "pass"
    assert verdict(["info", "block", "warn"]) == "block"
    assert verdict(["info", "pass"]) == "info"
    assert verdict(["warn", "uncertain", "pass"]) == "uncertain"
    assert verdict(["warn", "error", "uncertain"]) == "error"
    assert verdict(["error", "block"]) == "block"
    assert set(VERDICTS) == {PASS, *LEVELS, *UNKNOWN}
