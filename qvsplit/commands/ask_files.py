"""Files that `qvsplit ask --image` names and no store has: encoded for the questions of this run alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qvsplit.commands.extract import callbacks
from qvsplit.commands.opening import open_with_progress
from qvsplit.commands.options import DEFAULT_STORE
from qvsplit.output.progress import ProgressBar
from qvsplit.output.text import plural, say

if TYPE_CHECKING:
    from qvsplit.answering.collection import Collection
    from qvsplit.answering.options import AskOptions
    from qvsplit.pipeline.summary import ExtractCallbacks
    from qvsplit.store.store import Store


def open_items(
    places: Sequence[str], names: Sequence[str], options: AskOptions, *, quiet: bool, progress: str
) -> Collection:
    """Open the store in `places`; where a name is none of its items, but a file, that is encoded beside it.

    Where there is no store at the default place, and every name is a file, none is needed.
    """
    from qvsplit.on_demand import encoder_options, files_at_hand, is_file

    without_store = list(places) == [DEFAULT_STORE] and not os.path.lexists(DEFAULT_STORE)
    store: Store | None = None
    if not (without_store and names and all(map(is_file, names))):
        store = open_with_progress(*places, quiet=quiet, progress=progress)
    files = [name for name in names if is_file(name) and (store is None or not store.matching(name))]
    if store is not None and not files:
        return store
    with ProgressBar(progress, shown=not quiet) as shown:
        hand = files_at_hand(
            files, store=store, options=encoder_options(store, options), callbacks=without_failures(callbacks(shown))
        )
    if hand.encoded and not quiet:
        files_were = plural(hand.encoded, "file was", "files were")
        say(f"{files_were} encoded for these questions alone; `qvsplit extract` keeps what it encodes")
    return hand


def without_failures(hearing: ExtractCallbacks) -> ExtractCallbacks:
    """Give callbacks that pass over failed files: who asks about them is told otherwise."""
    return replace(hearing, on_failure=lambda path, reason: None)
