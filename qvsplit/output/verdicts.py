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
from qvsplit.output.levels import DEFAULT_LEVEL, ERROR, LEVELS, PASS, UNCERTAIN, UNKNOWN, VERDICTS, verdict
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
        uncertain: The names of the checks whose choices the model would not have given by itself; and `frames` for an
            animated image, or a TIFF of several pages, of which only the first was looked at, `cut_off` for an image
            some of whose pixels are missing.
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

    @property
    def unseen(self) -> str:
        """What nobody has looked at, in words; "" where all was."""
        unseen = {text: None for row in self.rows for name, text in row.unseen.items() if name in self.uncertain}
        return "; ".join(unseen)

    def to_json(self, *, absolute: bool = False) -> dict[str, Any]:
        """Give it as the commands print it in JSON."""
        record: dict[str, Any] = {"type": "verdict"} | names_of(self.rows, absolute=absolute)
        record |= {"verdict": self.verdict, "flagged": list(self.flagged), "uncertain": list(self.uncertain)}
        return record | ({"error": self.error} if self.error else {})


def verdict_on_answers(answers: Sequence[Answer]) -> ItemVerdict:
    """Give the verdict on the items of one prompt, from all answers about them."""
    rows = answers[0].rows
    names = sorted({name for row in rows for name in row.unseen})
    unseen = [ItemVerdict(rows, UNCERTAIN, uncertain=tuple(names))] if names else []
    return joined(rows, [*map(_verdict_on_answer, answers), *unseen])


def _verdict_on_answer(answer: Answer) -> ItemVerdict:
    flagged = (answer.name,) if answer.flagged else ()
    uncertain = (answer.name,) if answer.uncertain else ()
    level = (answer.level or DEFAULT_LEVEL) if answer.flagged else None
    return ItemVerdict(answer.rows, answer.verdict or PASS, flagged, uncertain, answer.error or "", level)


def joined(rows: tuple[Row, ...], parts: Sequence[ItemVerdict]) -> ItemVerdict:
    """Give one verdict of several: the gravest, with all that was flagged or is uncertain in any."""
    levels = [part.level for part in parts if part.level is not None]
    return ItemVerdict(
        rows,
        verdict(part.verdict for part in parts),
        flagged=tuple(name for part in parts for name in part.flagged),
        uncertain=tuple(name for part in parts for name in part.uncertain),
        error=next((part.error for part in parts if part.error), ""),
        level=max(levels, key=LEVELS.index, default=None),
    )


def verdict_on_failed(row: Row) -> ItemVerdict:
    """Give the verdict on an item that could not be checked: its row says why."""
    return ItemVerdict((row,), ERROR, error=failure_reason(row))


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
