"""Select from a store, held against what is on disk: files that are not in it, or have changed since."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qvsplit.commands.wording import say_note
from qvsplit.errors import escaped
from qvsplit.output.text import plural

if TYPE_CHECKING:
    from qvsplit.answering.collection import Collection
    from qvsplit.answering.selection import Selection
    from qvsplit.pipeline.freshness import Freshness
    from qvsplit.store.row import Row


def select_and_compare(
    store: Collection,
    places: Sequence[str],
    names: Sequence[str],
    reference: Row | None,
    *,
    is_gate: bool,
    quiet: bool,
) -> Selection:
    """Select as `select` does, from the store and from what it should have: a file not yet extracted is a failed row.

    For a gate so is an item that is not known to be on disk as it was extracted, in place of its rows, and a folder
    that cannot be listed; else that is only noted, as are folders that do not exist on this machine. Shards alone say
    nothing of what a whole store has; where items are named one by one no folder is listed.
    """
    from qvsplit.answering.selection import select
    from qvsplit.pipeline.freshness import Freshness, freshness, outdated, roots_not_found, unreadable_rows
    from qvsplit.store.finding import is_glob

    found = Freshness((), {}, (), ())
    if not names or any(map(is_glob, names)):  # a name alone matches nothing that is new; a glob may
        known = {row.key for status in ("ok", "failed") for row in store.rows_with_status(status)}
        found = freshness(known, [place for place in places if os.path.isdir(place)])
    selection = select(store, names, not_extracted=found.new)
    asked = [*selection.rows, *([] if reference is None else [reference])]
    stale = outdated(asked, found.unreadable, by_content=is_gate)
    if not quiet:
        _say_notes(replace(found, not_found=tuple(dict.fromkeys((*found.not_found, *roots_not_found(asked))))))
    if not is_gate:
        if stale and not quiet:
            _say_stale(len(stale))
        return selection
    stale += unreadable_rows(found.unreadable, [*selection.rows, *selection.failed])
    return _without_stale(selection, stale, reference)


def _without_stale(selection: Selection, stale: Sequence[Row], reference: Row | None) -> Selection:
    """Give the selection with the failed rows in place of the items' own; with a stale reference all have failed."""
    failed = {row.key: row for row in stale}
    behind = failed.get(reference.key) if reference is not None else None
    if behind is not None:
        error = f"has not been compared: the reference {behind.error}"
        for row in selection.rows:
            failed.setdefault(row.key, replace(behind, root=row.root, path=row.path, kind=row.kind, error=error))
        if all(row.key != behind.key for row in selection.rows):
            del failed[behind.key]  # it is no item of the selection
    rows = [row for row in selection.rows if row.key not in failed]
    return replace(selection, rows=rows, failed=[*selection.failed, *failed.values()])


def _say_notes(found: Freshness) -> None:
    """Say of which folders nothing is known."""
    for place in found.unknown:
        say_note(
            f"{escaped(place)}: it is not known which folders this store is kept up to date with; files that are not "
            "yet extracted are not known"
        )
    for folder in found.not_found:
        say_note(
            f"{escaped(folder)} does not exist on this machine, or holds no images any more; what is new or changed in "
            "it is not known"
        )
    for folder, why in found.unreadable.items():
        say_note(f"{escaped(folder)} cannot be read ({why}); what is new or changed in it is not known")


def _say_stale(number: int) -> None:
    their = "its" if number == 1 else "their"
    say_note(f"{plural(number, 'item')} may have changed on disk since {their} extraction; {their} answers may be old")
