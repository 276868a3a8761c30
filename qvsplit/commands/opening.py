"""Open a store, and show how far that is where its catalogue has to be made again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qvsplit.output.progress import ProgressBar

if TYPE_CHECKING:
    from qvsplit.store.store import Store

FEW_SHARDS = 8  # fewer are read in less than a second


def open_with_progress(*places: str, quiet: bool = False, progress: str = "auto") -> Store:
    """Open the store in `places`, and show how many shards have been read of those that have to be."""
    from qvsplit.store.opening import open_store

    with ProgressBar(progress, shown=not quiet) as shown:
        return open_store(*places, on_shard=counting_shards(shown))


def counting_shards(
    progress: ProgressBar, what: str = "shards read", few: int = FEW_SHARDS
) -> Callable[[int, int], None]:
    """Give what hears of each shard, and counts it in `progress`, where there are `few` or more."""

    def on_shard(done: int, total: int) -> None:
        if total < few:
            return
        if done == 0:
            progress.start(what, total)
        else:
            progress.advance()
        if done == total:
            progress.stop()

    return on_shard
