"""How grave what a check flags is, and what it comes to for an item. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable

LEVELS = ("info", "warn", "block")
DEFAULT_LEVEL = "warn"  # of a check that names none
PASS = "pass"  # the verdict on an item for which nothing was flagged
ERROR = "error"  # the verdict on an item that could not be checked: graver than any level, as nothing is known of it
VERDICTS = (PASS, *LEVELS, ERROR)  # the gravest last
CHOICE_MASS_LOW = 0.01  # below it the choices were none of what the model would have said by itself


def verdict(levels: Iterable[str]) -> str:
    """Give the verdict on an item from the levels of what was flagged, and ERROR where an answer failed: the gravest.

    `pass` where nothing was.
    """
    return max(levels, key=VERDICTS.index, default=PASS)
