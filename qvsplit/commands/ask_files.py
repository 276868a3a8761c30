"""Files that `qvsplit ask --image` names and no store has: encoded for the questions of this run alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qvsplit.commands.extract import callbacks
from qvsplit.commands.opening import open_with_progress
from qvsplit.commands.options import DEFAULT_IMAGE_PIXELS, DEFAULT_ITEM_SECONDS, DEFAULT_STORE
from qvsplit.commands.wording import say_note
from qvsplit.errors import UsageError, escaped, some_of
from qvsplit.output.names import file_of
from qvsplit.output.progress import ProgressBar
from qvsplit.output.text import plural, say
from qvsplit.runtime.names import file_on_disk, storable_mtime
from qvsplit.sources.files import sha256_of

if TYPE_CHECKING:
    from qvsplit.answering.collection import Collection
    from qvsplit.answering.options import AskOptions
    from qvsplit.on_demand import FilesAtHand
    from qvsplit.pipeline.summary import ExtractCallbacks
    from qvsplit.store.row import Row
    from qvsplit.store.store import Store


@dataclass(frozen=True, slots=True)
class Limits:
    """What a file may take: pixels of an image, and seconds for each step of reading it."""

    max_image_pixels: int = DEFAULT_IMAGE_PIXELS
    item_timeout: float = DEFAULT_ITEM_SECONDS


LIMITS = Limits()


def open_items(
    places: Sequence[str],
    names: Sequence[str],
    options: AskOptions,
    *,
    has_flags: bool,
    quiet: bool,
    progress: str,
    limits: Limits = LIMITS,
) -> Collection:
    """Open the store in `places`; a name that is a file, and none of its items as they were, is encoded beside it.

    Where there is no store at the default place, and every name is a file, none is needed. A name that is a file, and
    that of another item of the store, means the item; where checks may be flagged (`has_flags`) that is a UsageError.
    """
    from qvsplit.on_demand import is_file

    without_store = list(places) == [DEFAULT_STORE] and not os.path.lexists(DEFAULT_STORE)
    store: Store | None = None
    if not (without_store and names and all(map(is_file, names))):
        store = open_with_progress(*places, quiet=quiet, progress=progress)
    return with_files(store, names, options, has_flags=has_flags, quiet=quiet, progress=progress, limits=limits)


def with_files(
    store: Store | None,
    names: Sequence[str],
    options: AskOptions,
    *,
    has_flags: bool,
    quiet: bool,
    progress: str,
    limits: Limits = LIMITS,
) -> Store | FilesAtHand:
    """Give the store, with those of `names` beside it that are files and none of its items as they were.

    Without a store all of them have to be files.
    """
    from qvsplit.on_demand import encoder_options, files_at_hand, is_file

    files = [name for name in names if is_file(name)]
    if store is not None:
        files = [name for name in files if _is_at_hand(store, name, has_flags=has_flags, quiet=quiet)]
    if store is not None and not files:
        return store
    encoding = encoder_options(store, options, limits.item_timeout, limits.max_image_pixels)
    with ProgressBar(progress, shown=not quiet) as shown:
        hand = files_at_hand(files, store=store, options=encoding, callbacks=without_failures(callbacks(shown)))
    if hand.encoded and not quiet:
        files_were = plural(hand.encoded, "file was", "files were")
        say(f"{files_were} encoded for these questions alone; `qvsplit extract` keeps what it encodes")
    return hand


def _is_at_hand(store: Store, name: str, *, has_flags: bool, quiet: bool) -> bool:
    """Say whether the file of this name is to be encoded: the store has it not, or as it was before a change."""
    named = store.matching(name)
    if not named:
        return True
    rows = [row for row in named if _is_same_file(row, name)]
    if any(_is_as_extracted(row, name) for row in rows):
        return False
    sha256 = sha256_of(name)
    if sha256 is None or any(row.sha256 == sha256 for row in rows or named):  # unreadable, or of the same content
        return False
    if rows:
        return True
    theirs = some_of((escaped(file_of(row)) for row in named), 3)
    means = f"{escaped(name)} is the store's {theirs}; write {escaped(os.path.join('.', name))} for the file here"
    if has_flags:
        raise UsageError(means)
    if not quiet:
        say_note(means)
    return False


def _is_same_file(row: Row, name: str) -> bool:
    try:
        return os.path.samefile(file_on_disk(row.root, row.path), name)
    except OSError:
        return False


def _is_as_extracted(row: Row, name: str) -> bool:
    try:
        status = os.stat(name)
    except OSError:
        return False
    return row.version is not None and (row.size, row.mtime_ns) == (status.st_size, storable_mtime(status.st_mtime_ns))


def without_failures(hearing: ExtractCallbacks) -> ExtractCallbacks:
    """Give callbacks that pass over failed files: who asks about them is told otherwise."""
    return replace(hearing, on_failure=lambda path, reason: None)
