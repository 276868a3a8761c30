"""Every error a user can meet, as one tree: a message and an exit code per class.

Two branches, on purpose apart:

* `QvsplitError`: the run cannot go on (bad usage, model, album, disk). Printed as one line, then `exit_code`.
* `PictureError`: this one picture is bad. Recorded in its row, the run goes on; never an exit by itself.

    QvsplitError
    ├── UsageError            2   the words of the call are off
    ├── ModelError            3   no such model, or not loadable
    │   ├── WeightsError      3   tensors missing, left over, or of the wrong shape
    │   └── OutOfMemory       3   the model is loaded, and what was asked of it does not fit beside it
    ├── RecipeError           4   rows made with another tower, processor, dtype or format
    ├── AlbumInUse            5   another run is writing
    ├── AlbumDamaged          6   a shard is not what was written
    │   └── ShardDamaged      6   by its own bytes: it can be set aside and made anew
    └── DiskError             7   full, or not writable
    PictureError
    └── PictureVanished           its file is no longer there
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping

PICTURES_FAILED = 1
CHECKS_RAISED = 8
INTERRUPTED = 130  # 128 + SIGINT
TERMINATED = 143  # 128 + SIGTERM


# Direction overrides and isolates: they can make a line show something else than it says.
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str, *, keep: str = "") -> str:
    """`text` safe for a terminal and on one line: what could move the cursor or turn the text is escaped.

    Joiners and the like stay, as scripts and emoji need them; characters of `keep` stay too.
    """
    return "".join(c if c in keep or _is_harmless(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def _is_harmless(character: str) -> bool:
    return unicodedata.category(character) not in {"Cc", "Cs", "Zl", "Zp"} and character not in _DIRECTIONS


def some_of(names: Iterable[str], most: int = 5) -> str:
    """`names` as a short list for a message: the first few, and how many more there are."""
    listed = sorted(names)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest


def size(count: int) -> str:
    """`count` bytes for people: decimal units."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count / 1000:.1f} kB"


class QvsplitError(Exception):
    """The run cannot go on. The message is one line: what, where, what to do next."""

    exit_code = 1

    def __str__(self) -> str:
        return printable(" ".join(super().__str__().split()))


class UsageError(QvsplitError):
    """The words of the call are off: a path that is not there, nothing to ask, a choice that does not exist."""

    exit_code = 2


class ModelError(QvsplitError):
    """The model was not found, or cannot be loaded."""

    exit_code = 3


class WeightsError(ModelError):
    """A checkpoint whose tensors are not exactly those the half needs."""

    def __init__(
        self,
        where: str,
        *,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        misshapen: Mapping[str, str] | None = None,
    ) -> None:
        self.missing = sorted(missing)
        self.unexpected = sorted(unexpected)
        self.misshapen = dict(misshapen or {})
        parts = []
        if self.missing:
            parts.append(f"missing: {some_of(self.missing)}")
        if self.unexpected:
            parts.append(f"unexpected: {some_of(self.unexpected)}")
        if self.misshapen:
            parts.append("wrong shape: " + some_of(f"{name} {why}" for name, why in self.misshapen.items()))
        super().__init__(
            f"the tensors in {where} do not fit its config.json ({'; '.join(parts)}); "
            "download the checkpoint again, or point --model at the right folder"
        )


class OutOfMemory(ModelError):
    """What was asked does not fit into memory beside the model."""


class RecipeError(QvsplitError):
    """Rows made under one recipe were about to be used, or continued, under another."""

    exit_code = 4


class AlbumInUse(QvsplitError):
    """Another process holds the album's lock."""

    exit_code = 5


class AlbumDamaged(QvsplitError):
    """A shard, or a row of it, is not what qvsplit wrote."""

    exit_code = 6


class ShardDamaged(AlbumDamaged):
    """A shard's own bytes are not what was written: `path` and `what` of it. Its pictures can be encoded again."""

    def __init__(self, message: str, path: str, what: str) -> None:
        super().__init__(message)
        self.path = path
        self.what = what


class DiskError(QvsplitError):
    """The disk is full, or the folder cannot be written."""

    exit_code = 7


class PictureError(Exception):
    """One picture is bad: the reason goes into its row, and the run goes on."""

    def __str__(self) -> str:
        return printable(" ".join(super().__str__().split()))


class PictureVanished(PictureError):
    """A file that the walk had seen is no longer there: neither a picture nor a failure."""
