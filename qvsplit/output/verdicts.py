"""What the checks of one item come to, and the gate over all of them.

The gate fails closed. What is not known trips it at every level unless that is allowed: an item that could not be
encoded or asked about (`error`), and one of which the model would have said something else than a check's choices
(`uncertain`). Knows answers and rows; no models, no files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvsplit.errors import UsageError
from qvsplit.output.answer import Answer
from qvsplit.output.levels import ERROR, LEVELS, UNCERTAIN, UNKNOWN, VERDICTS, verdict
from qvsplit.output.names import names_of

if TYPE_CHECKING:
    from qvsplit.store.row import Row


@dataclass(frozen=True)
class ItemVerdict:
    """The verdict on one item, or on the items of one prompt.

    Attributes:
        rows: The items.
        verdict: The gravest of what all answers come to.
        flagged: The names of the checks that were flagged.
        uncertain: The names of the checks whose choices the model would not have given by itself.
        error: Why there is no answer to a question, or none at all.
        level: The highest level of what was flagged, whatever else is uncertain; None where nothing was.
    """

    rows: tuple[Row, ...]
    verdict: str
    flagged: tuple[str, ...] = ()
    uncertain: tuple[str, ...] = ()
    error: str = ""
    level: str | None = None

    @property
    def reason(self) -> str:
        """What the verdict hangs on: the names of the checks that were flagged or are uncertain, and the error."""
        names = ",".join((*self.flagged, *self.uncertain))
        return "; ".join(part for part in (names, self.error) if part)

    def to_json(self, *, absolute: bool = False) -> dict[str, Any]:
        """Give it as the commands print it in JSON."""
        record: dict[str, Any] = {"type": "verdict"} | names_of(self.rows, absolute=absolute)
        record |= {"verdict": self.verdict, "flagged": list(self.flagged), "uncertain": list(self.uncertain)}
        return record | ({"error": self.error} if self.error else {})


def verdict_on_answers(answers: Sequence[Answer]) -> ItemVerdict:
    """Give the verdict on the items of one prompt, from all answers about them."""
    errors = [answer.error for answer in answers if answer.error is not None]
    levels = [level for answer in answers if answer.flagged and (level := answer.verdict) in LEVELS]
    return ItemVerdict(
        answers[0].rows,
        verdict(one for answer in answers if (one := answer.verdict) is not None),
        flagged=tuple(answer.name for answer in answers if answer.flagged),
        uncertain=tuple(answer.name for answer in answers if answer.uncertain),
        error=errors[0] if errors else "",
        level=max(levels, key=LEVELS.index, default=None),
    )


def verdict_on_failed(row: Row, reason: str = "") -> ItemVerdict:
    """Give the verdict on an item that could not be checked: its row says why, unless `reason` does."""
    return ItemVerdict((row,), ERROR, error=reason or failure_reason(row))


def failure_reason(row: Row) -> str:
    """Say why an item could not be encoded."""
    return row.error or f"is {row.status}"


def check_level(level: str) -> None:
    """Raise UsageError unless `level` is one that a gate can have."""
    if level not in LEVELS:
        raise UsageError(f"{level} is no level; choose one of {', '.join(LEVELS)}")


def check_allowed(allowed: Iterable[str]) -> None:
    """Raise UsageError for what a gate cannot allow."""
    for name in allowed:
        if name not in UNKNOWN:
            raise UsageError(f"{name} cannot be allowed; choose {' or '.join(UNKNOWN)}, or both with a comma")


def trips(verdicts: Iterable[ItemVerdict], level: str, allowed: Collection[str] = ()) -> bool:
    """Say whether anything was flagged at `level` or above, or is uncertain or an error and that is not allowed."""
    return any(_trips(item, level, allowed) for item in verdicts)


def _trips(item: ItemVerdict, level: str, allowed: Collection[str]) -> bool:
    if item.level is not None and LEVELS.index(item.level) >= LEVELS.index(level):
        return True
    is_error = bool(item.error) or item.verdict == ERROR
    is_uncertain = bool(item.uncertain) or item.verdict == UNCERTAIN
    return (is_error and ERROR not in allowed) or (is_uncertain and UNCERTAIN not in allowed)


def count_line(verdicts: Iterable[ItemVerdict]) -> str:
    """Give `error: 1, block: 2, pass: 3`; verdicts that nothing has are left out."""
    counts = Counter(item.verdict for item in verdicts)
    return ", ".join(f"{name}: {counts[name]:,}" for name in reversed(VERDICTS) if counts[name])
