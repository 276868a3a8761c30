"""Every error a user can meet, as one tree: a message and an exit code per class. And what they are warned of.

Two branches, on purpose apart:

* `QvsplitError`: the run cannot go on (bad usage, model, store, disk). Printed as one line, then `exit_code`.
* `ItemError`: this one image or video is bad. Recorded in its row, the run goes on; never an exit by itself.

    QvsplitError
    ├── UsageError            2   the words of the call are wrong
    ├── ModelError            3   no such model, or it cannot be loaded
    │   ├── WeightsError      3   tensors missing, unexpected, or of the wrong shape
    │   ├── RequestError      3   the model answers, but not this: about a video, say
    │   └── OutOfMemory       3   what was asked does not fit into memory
    ├── ConfigError           4   rows of another encoder, processor, dtype or format, or of a newer qvsplit
    ├── StoreInUse            5   another run is writing
    ├── StoreDamaged          6   a shard is not what was written
    │   ├── ShardDamaged      6   by its own bytes: it can be quarantined, and its items encoded again
    │   └── ShardNotFound     6   it was there when the store was opened
    ├── DiskError             7   full, or not writable
    └── ProcessError         70   no process can be started here, or a cluster was lost
    ItemError
    └── ItemNotFound              its file no longer exists

`QvsplitWarning` is of what ends no run and should be known: printed as one line on stderr, in Python a warning.

All of them survive pickling: errors of one item or one request are passed on as values.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

ITEMS_FAILED = 1
BUG = 70  # EX_SOFTWARE of sysexits.h
CHECKS_FLAGGED = 8
INTERRUPTED = 130  # 128 + SIGINT
TERMINATED = 143  # 128 + SIGTERM
ERROR_KINDS = ("reader-missing", "timeout", "permission", "memory", "content")

# Direction overrides and isolates: they can make a line show something else than it says.
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_HEX = r"(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})"
_ESCAPE = re.compile(rf"\\({_HEX})")
_BACKSLASH_OF_AN_ESCAPE = re.compile(rf"\\(?={_HEX})")


def printable(text: str, *, keep: str = "") -> str:
    """Make `text` safe for a terminal and one line: what could move the cursor or turn the text is escaped.

    Joiners and the like stay, as scripts and emoji need them; characters of `keep` stay too. What is printable stays as
    it is, so that a line may be made of parts that were escaped before: names by `escaped`, errors by themselves.
    """
    return "".join(c if c in keep or _is_harmless(c) else _escape(c) for c in text)


def escaped(name: str) -> str:
    r"""Give the name of a file for a line of text, on one line and so that no other name looks like it.

    As `printable`; and a backslash that would read as an escape is `\x5c`, so that `unescaped` gives the name again.
    """
    return printable(_BACKSLASH_OF_AN_ESCAPE.sub(r"\\x5c", name))


def unescaped(text: str) -> str:
    r"""Invert `escaped`, and what a stream does with characters beyond its encoding: `\xe9`, `\u20ac`, `\U0001f5bc`."""
    return _ESCAPE.sub(_character, text)


def on_one_line(text: str) -> str:
    """Join the lines of `text` by blanks. Blanks within a line are left: they may belong to the name of a file."""
    lines = text.splitlines()
    return lines[0] if len(lines) == 1 else " ".join(filter(None, map(str.strip, lines)))


def _is_harmless(character: str) -> bool:
    return unicodedata.category(character) not in {"Cc", "Cs", "Zl", "Zp"} and character not in _DIRECTIONS


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"  # the harmful ones are all in the first plane


def _character(escape: re.Match[str]) -> str:
    code = int(escape[1][1:], 16)
    return chr(code) if code <= sys.maxunicode else escape[0]


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
    """The run cannot go on.

        except qvsplit.QvsplitError as error:
            sys.exit(str(error))

    The message is one line: what, where, what to do next.
    """

    exit_code = BUG

    def __str__(self) -> str:
        return escaped(on_one_line(super().__str__()))


class QvsplitWarning(UserWarning):
    """What the user should know, though nothing ends by it."""


class UsageError(QvsplitError):
    """The words of the call are wrong: a path that does not exist, nothing to ask, no such choice."""

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
            "download the checkpoint again, or name the right folder as `model`"
        )
        self._where = where

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the arguments, not by the message made from them."""
        return partial(WeightsError, missing=self.missing, unexpected=self.unexpected, misshapen=self.misshapen), (
            self._where,
        )


class RequestError(ModelError):
    """The model cannot answer this one request; others it can: it takes no videos, say."""


class OutOfMemory(ModelError):
    """What was asked does not fit into memory."""


class ConfigError(QvsplitError):
    """Rows of one extraction config were about to be used, or continued, under another."""

    exit_code = 4


class StoreInUse(QvsplitError):
    """Another process holds the store's lock."""

    exit_code = 5


class StoreDamaged(QvsplitError):
    """A shard, or a row of it, is not what qvsplit wrote."""

    exit_code = 6


class ShardDamaged(StoreDamaged):
    """A shard's own bytes are not what was written. Its items can be encoded again.

    Attributes:
        path: The shard's file.
        what: What is wrong with it, in a few words.
    """

    def __init__(self, message: str, path: str, what: str) -> None:
        super().__init__(message)
        self.path = path
        self.what = what

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with all three arguments."""
        return ShardDamaged, (self.args[0], self.path, self.what)


class ShardNotFound(StoreDamaged):
    """A shard no longer exists: it was deleted, or a compaction has put others in its place."""


class DiskError(QvsplitError):
    """The disk is full, or the folder cannot be written."""

    exit_code = 7


class ProcessError(QvsplitError):
    """A process that is needed cannot be started, or was lost with its cluster: the machines are at fault."""


class ItemError(Exception):
    """One item is bad: the reason goes into its row, and the run goes on.

        except qvsplit.ItemError as error:  # of load_encoder's encode
            print(error, error.kind)

    Attributes:
        kind: What would cure it. `reader-missing`, `timeout`, `permission` and `memory` may be cured without a change
            of the file, `content` may not.
    """

    def __init__(self, message: str, kind: str = "content") -> None:
        if kind not in ERROR_KINDS:
            raise ValueError(f"no kind of error: {kind}")
        super().__init__(message)
        self.kind = kind

    def __str__(self) -> str:
        return escaped(on_one_line(str(self.args[0])))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with both arguments."""
        return type(self), (self.args[0], self.kind)


class ItemNotFound(ItemError):
    """A file that was listed no longer exists: neither an item nor a failure."""
