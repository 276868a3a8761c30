"""`qvsplit compact`: merge small shards and drop what is superseded."""

from __future__ import annotations

import sys
from dataclasses import asdict

from qvsplit.commands.opening import counting_shards
from qvsplit.commands.options import DryRun, FolderArgument, FolderOption, Json, ProgressMode, Quiet, Wait, store_place
from qvsplit.commands.wording import say_note
from qvsplit.output.progress import ProgressBar
from qvsplit.output.text import compacted_line, foretold_line, print_json, say
from qvsplit.runtime.streams import is_terminal


def compact(
    store: FolderArgument = None,
    embeds: FolderOption = None,
    dry_run: DryRun = False,
    wait: Wait = False,
    as_json: Json = False,
    progress: ProgressMode = "auto",
    quiet: Quiet = False,
) -> None:
    """Tidy a store.

    Merges small shards, and drops superseded rows and the features of deleted items. Nothing is encoded again, and
    no answer changes; it may be killed at any moment. Needs as much free disk space as it rewrites.

    Examples:
        # What it would do
        qvsplit compact album --dry-run
        qvsplit compact album
    """
    from qvsplit.store import compact as library

    place = store_place(store, embeds)
    if dry_run:
        with library.opened_for_reading(place) as (reading, opened):
            plan = asdict(library.foretell_compact(reading, opened))
        if as_json:
            print_json({"type": "preview"} | plan)
        else:
            print(foretold_line(plan))  # to stdout: it is the result
        return
    with (
        ProgressBar(progress, shown=not quiet) as shown,
        library.opened_for_writing(place, wait=wait, on_note=say_note) as (storage, lock),
    ):
        done = library.compact(storage, lock, on_shard=counting_shards(shown, "shards rewritten", few=1))
    changed = done.rows_dropped or done.shards_before != done.shards_after
    if as_json:
        print_json({"type": "summary"} | asdict(done))
    elif not quiet and (changed or is_terminal(sys.stderr)):
        say(compacted_line(asdict(done), place))
