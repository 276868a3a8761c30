"""Open a store, and show how far that is where its catalogue has to be made again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from qvsplit.output.progress import ProgressBar
from qvsplit.runtime.streams import is_terminal

if TYPE_CHECKING:
    from qvsplit.store.store import Store

FEW_SHARDS = 8  # fewer are read in less than a second


def open_with_progress(*places: str, quiet: bool = False) -> Store:
    """Open the store in `places`; where somebody watches, a bar counts the shards that have to be read."""
    from qvsplit.store.opening import open_store

    with ProgressBar(shown=is_terminal(sys.stderr) and not quiet) as progress:
        return open_store(*places, on_shard=counting_shards(progress))


def counting_shards(progress: ProgressBar) -> Callable[[int, int], None]:
    """Give what hears of each shard that is read, and counts it in `progress`."""

    def on_shard(done: int, total: int) -> None:
        if total < FEW_SHARDS:
            return
        if done == 0:
            progress.start("shards read", total)
        else:
            progress.advance()
        if done == total:
            progress.stop()

    return on_shard
