"""Choose what is asked about: the rows of a store that names or globs select."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qvsplit.answering.collection import Collection
from qvsplit.errors import UsageError
from qvsplit.output.names import count_rows, shown_name, without_time_span
from qvsplit.store.finding import RowsAtHand, matching
from qvsplit.store.row import Row


@dataclass(frozen=True)
class Selection:
    """What was chosen of a store: `rows` that can be asked about, and those that `failed` when they were extracted.

    The latter are no answer's: whoever gives verdicts must say that they have none.
    """

    rows: list[Row]
    failed: list[Row]


def select(
    store: Collection, names: Sequence[str] = (), *, only: int | None = None, not_extracted: Sequence[Row] = ()
) -> Selection:
    """Choose the rows that `names` name or, as globs, match, by path or by file name; all without names.

    The name of a video names all its parts, `film.mp4#1` one of them. What `output.names.shown_name` gives is a name.
    Failed rows of files that are `not_extracted` are chosen from beside the store's.

    Raises:
        UsageError: A name names none, neither sound nor failed; or there is another number of sound ones than `only`.
    """
    if names:
        found = {(row.key, row.part): row for name in names for row in _matching(store, not_extracted, name, only)}
        chosen = [found[key] for key in sorted(found)]
        rows = [row for row in chosen if row.status == "ok"]
        failed = [row for row in chosen if row.status == "failed"]
    else:
        chosen, rows, failed = [], list(store), [*store.rows_with_status("failed"), *not_extracted]
    named = " ".join(names)
    if only is not None and len(rows) != only:
        why = "".join(f"; {shown_name(row)} has failed: {row.error}" for row in failed[:1])
        if len({row.key for row in rows}) == only:
            why = f"; it is a video in several parts: give one, such as {shown_name(rows[0])}"
        raise UsageError(f"{named} matches {len(rows)} of the store's {count_rows(store)}, not {only}{why}")
    if not rows and not failed and chosen:
        raise UsageError(f"`image` {named}: {shown_name(chosen[0])} has been deleted from {chosen[0].root}")
    if not rows and not failed:
        raise UsageError("the store holds no item that can be asked about; `qvsplit inspect` says what is in it")
    return Selection(rows, failed)


def _matching(store: Collection, not_extracted: Sequence[Row], name: str, only: int | None) -> list[Row]:
    """Give the rows of a name, also of one that was printed with the seconds of a part.

    UsageError where there are none: of several names one that is mistyped must not go unnoticed.
    """
    rows = store.matching(name) or store.matching(without_time_span(name))
    rows += matching(RowsAtHand(not_extracted), name)
    if rows:
        return rows
    what = name if only is not None else f"`image` {name}"
    raise UsageError(f"{what} matches none of the store's {count_rows(store)}{store.hint(name)}")
