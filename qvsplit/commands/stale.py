"""What a gate over a store has to know beside its rows: files that are not in it, or have changed since."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qvsplit.commands.wording import say_note
from qvsplit.errors import escaped
from qvsplit.output.text import plural

if TYPE_CHECKING:
    from qvsplit.answering.selection import Selection
    from qvsplit.store.row import Row


def with_stale_items(
    selection: Selection, places: Sequence[str], names: Sequence[str], *, is_gate: bool, quiet: bool
) -> Selection:
    """Give the selection with a failed row for each selected file that is not yet extracted.

    For a gate so is one whose file has changed since, in place of its rows; else that is only noted, as are folders
    that do not exist on this machine. Shards alone say nothing of what a whole store has.
    """
    from qvsplit.pipeline.freshness import freshness
    from qvsplit.store.opening import open_store

    for place in places:
        if not os.path.isdir(place):
            continue
        with open_store(place) as store:
            found = freshness(store, Path(place))
        new, changed = _selected(found.new, names), _selected(found.changed, names)
        at_hand = {row.key for row in (*selection.rows, *selection.failed)}  # files that were encoded for this run
        failed = [*selection.failed, *(row for row in new if row.key not in at_hand)]
        if is_gate:
            keys = {row.key for row in changed}
            selection = replace(selection, rows=[row for row in selection.rows if row.key not in keys])
            failed = [row for row in failed if row.key not in keys] + list(changed)
        elif changed and not quiet:
            have = "has" if len(changed) == 1 else "have"
            say_note(
                f"{plural(len(changed), 'item')} {have} changed on disk since they were extracted; answers are old"
            )
        selection = replace(selection, failed=failed)
        if not quiet:
            for folder in found.gone:
                say_note(f"{escaped(folder)} does not exist on this machine; what is new or changed in it is not known")
    return selection


def _selected(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Give those of the rows that names and globs select; all without names."""
    from qvsplit.store.finding import RowsAtHand, matching

    if not names:
        return list(rows)
    return list(dict.fromkeys(row for name in names for row in matching(RowsAtHand(rows), name)))
