"""What the checks of one item come to, and the gate over all of them.

The gate fails closed: an item that could not be encoded, and a question that could not be answered, have the verdict
`error`, which trips the gate at every level. Knows answers and rows; no models, no files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvsplit.errors import UsageError
from qvsplit.output.answer import Answer, verdict_on
from qvsplit.output.levels import ERROR, LEVELS, VERDICTS
from qvsplit.output.names import names_of

if TYPE_CHECKING:
    from qvsplit.store.row import Row


@dataclass(frozen=True)
class ItemVerdict:
    """The verdict on one item, or on the items of one prompt.

    `flagged` are the names of the checks that were flagged; `error` says why there is no other verdict than `error`.
    """

    rows: tuple[Row, ...]
    verdict: str
    flagged: tuple[str, ...] = ()
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """Give it as the commands print it in JSON."""
        record = names_of(self.rows) | {"verdict": self.verdict}
        if self.flagged or not self.error:
            record["flagged"] = list(self.flagged)
        if self.error:
            record["error"] = self.error
        return record


def verdict_on_answers(answers: Sequence[Answer]) -> ItemVerdict:
    """Give the verdict on the items of one prompt, from all answers about them."""
    flagged = tuple(answer.name for answer in answers if answer.flagged)
    errors = [answer.error for answer in answers if answer.error is not None]
    return ItemVerdict(answers[0].rows, verdict_on(answers), flagged, errors[0] if errors else "")


def verdict_on_failed(row: Row) -> ItemVerdict:
    """Give the verdict on an item that could not be encoded."""
    return ItemVerdict((row,), ERROR, error=failure_reason(row))


def failure_reason(row: Row) -> str:
    """Say why an item could not be encoded."""
    return row.error or f"is {row.status}"


def check_level(level: str) -> None:
    """Raise UsageError unless `level` is one that a gate can have."""
    if level not in LEVELS:
        raise UsageError(f"{level} is no level; choose one of {', '.join(LEVELS)}")


def trips(verdicts: Iterable[ItemVerdict], level: str) -> bool:
    """Say whether any verdict is `level` or above. `error` is above every level."""
    return any(VERDICTS.index(item.verdict) >= VERDICTS.index(level) for item in verdicts)


def count_line(verdicts: Iterable[ItemVerdict]) -> str:
    """Give `error: 1, block: 2, pass: 3`; verdicts that nothing has are left out."""
    counts = Counter(item.verdict for item in verdicts)
    return ", ".join(f"{name}: {counts[name]:,}" for name in reversed(VERDICTS) if counts[name])
