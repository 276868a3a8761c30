"""Choose what is asked about: the rows of a store that names or globs select."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qvsplit.errors import UsageError
from qvsplit.output.text import plural
from qvsplit.store.row import Row
from qvsplit.store.store import Store


@dataclass(frozen=True)
class Selection:
    """What was chosen of a store: `rows` that can be asked about, and those that `failed` when they were extracted.

    The latter are no answer's: whoever gives verdicts must say that they have none.
    """

    rows: list[Row]
    failed: list[Row]


def select(store: Store, names: Sequence[str] = (), *, only: int | None = None) -> Selection:
    """Choose the rows that `names` name or, as globs, match, by path or by file name; all without names.

    Raises:
        UsageError: There are none, neither sound nor failed; or another number of sound ones than `only`.
    """
    if names:
        found = {(row.key, row.part): row for name in names for row in store.matching(name)}
        chosen = [found[key] for key in sorted(found)]
        rows = [row for row in chosen if row.status == "ok"]
        failed = [row for row in chosen if row.status == "failed"]
    else:
        chosen, rows, failed = [], list(store), list(store.rows_with_status("failed"))
    named = " ".join(names)
    if only is not None and len(rows) != only:
        why = "".join(f"; {row.path} has failed: {row.error}" for row in failed[:1])
        raise UsageError(f"{named} matches {len(rows)} of the store's {plural(len(store), 'image')}, not {only}{why}")
    if not rows and not failed and chosen:
        raise UsageError(f"`image` {named}: {chosen[0].path} has been deleted from {chosen[0].root}")
    if not rows and not failed and names:
        raise UsageError(f"`image` {named} matches none of the store's {plural(len(store), 'image')}")
    if not rows and not failed:
        raise UsageError("the store holds no image that can be asked; `qvsplit inspect` says what is in it")
    return Selection(rows, failed)
