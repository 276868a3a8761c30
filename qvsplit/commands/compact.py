"""`qvsplit compact`: merge small shards and drop what is superseded."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from qvsplit.commands.options import FolderArgument, FolderOption, Json, Quiet, Wait, store_place
from qvsplit.output.text import compacted_line, is_terminal, say


def compact(
    store: FolderArgument = None,
    embeds: FolderOption = None,
    wait: Wait = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tidy a store.

    Merges small shards, and drops superseded rows and the features of deleted images. Nothing is encoded again, and
    no answer changes; it may be killed at any moment. Needs as much free disk space as it rewrites.
    """
    from qvsplit.store import compact as library

    place = store_place(store, embeds)
    with library.opened_for_writing(place, wait=wait, on_note=say) as (storage, lock):
        done = library.compact(storage, lock)
    changed = done.rows_dropped or done.shards_before != done.shards_after
    if as_json:
        print(json.dumps(asdict(done)))
    elif not quiet and (changed or is_terminal(sys.stderr)):
        say(compacted_line(asdict(done), place))
