"""How grave what a check flags is, and what it comes to for an item. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable

LEVELS = ("info", "warn", "block")
DEFAULT_LEVEL = "warn"  # of a check that names none
PASS = "pass"  # the verdict on an item for which nothing was flagged
UNCERTAIN = "uncertain"  # the model would have said something else than the choices of a check
ERROR = "error"  # the item, or one of its questions, could not be checked
UNSURE = "unsure"  # the answer to a check where no choice can be taken for one
UNKNOWN = (UNCERTAIN, ERROR)  # verdicts that trip a gate unless they are allowed
# The gravest last. What is not known may be anything up to block: nothing but a known block is graver.
VERDICTS = (PASS, "info", "warn", *UNKNOWN, "block")


def verdict(verdicts: Iterable[str]) -> str:
    """Give the verdict on an item from what each of its answers comes to: the gravest; `pass` where there is none."""
    return max(verdicts, key=VERDICTS.index, default=PASS)
