"""Which images and videos questions are typed about: of a store, of files, and those that are named meanwhile."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

from qvsplit.commands.ask_files import LIMITS, Limits, with_files
from qvsplit.commands.placement import ONE_EACH, Placement
from qvsplit.commands.wording import on_command_line
from qvsplit.errors import UsageError, escaped, some_of
from qvsplit.output.names import shown_name
from qvsplit.output.text import say
from qvsplit.output.verdicts import failure_reason
from qvsplit.runtime.names import name_on_disk, stored_name

if TYPE_CHECKING:
    from qvsplit.answering.collection import Collection
    from qvsplit.ask import PromptItems, Session
    from qvsplit.on_demand import FilesAtHand
    from qvsplit.store.row import Row
    from qvsplit.store.store import Store

MOST_SUGGESTED = 30  # that a key completes, of a store and of a folder each
MOST_LISTED = 20
_MOST_LOOKED_AT = 10_000  # files of a folder
_MOST_ENCODED = 8  # choices of files whose features are kept, should they be asked about again


@dataclass
class ChatItems:
    """What questions are typed about, and what that can be changed to.

    Attributes:
        session: What answers: the collection, system message and engine of now.
        items: The prompts of the images that are asked about.
        placement: How selected images stand in prompts.
        quiet: Whether nothing is said but failures.
        progress: How encoding is shown.
        limits: What a file may take that is encoded.
    """

    session: Session
    items: list[PromptItems]
    placement: Placement = ONE_EACH
    quiet: bool = False
    progress: str = "auto"
    limits: Limits = LIMITS
    _encoded: list[FilesAtHand] = field(default_factory=list)  # those used last are the last

    @property
    def store(self) -> Store | None:
        """The store, if there is one."""
        return store_of(self.session.store)

    @property
    def system(self) -> str | None:
        """The system message; None where it is the chat template's own."""
        return self.session.options.system

    def set_system(self, text: str | None) -> None:
        """Put this system message before the questions that follow."""
        self.session = self.session.over(self.session.store, system=text)

    def begin_again(self) -> None:
        """Ask as if nothing had been asked before."""
        self.items = [replace(one, earlier=()) for one in self.items]

    def choose(self, typed: str) -> None:
        """Ask about what is `typed`: a name, a glob, or a file, which is encoded if no store has it.

        Raises:
            QvsplitError: It names nothing that can be asked about; all stays as it was.
        """
        from qvsplit.answering.selection import select

        name = self._meant(typed)
        found = self._collection(name)
        if not found.matching(name) and (like := self.suggestions(name, False)):
            raise UsageError(f"no image is named {name}; some have it in their names: {some_of(like, 3)}")
        selection = select(found, [name])
        items = self.placement.prompts(selection, self.placement.row(found))
        say_failed(selection.failed)
        if not items:
            raise UsageError(f"{name} cannot be asked about")
        if found is not self.session.store:
            self.session = self.session.over(found, system=self.system)
        self.items = items

    def _meant(self, typed: str) -> str:
        """Give the name that is typed: as it stands, else as a shell reads it; the latter where neither names any."""
        from qvsplit.on_demand import is_file

        names = readings(typed)
        return next((name for name in names if is_file(name) or self.session.store.matching(name)), names[-1])

    def _collection(self, name: str) -> Collection:
        """Give what has the items of this name, and the reference: the store, or files that are none of its items."""
        from qvsplit.on_demand import is_file

        store = self.store
        if store is None and not is_file(name):
            if os.path.isdir(name):
                raise UsageError(f"{name} is a folder; name a file in it, or a store of it")
            raise UsageError(f"{name}: there is no such file")
        names = self.placement.names([name])
        files = {one for one in names if is_file(one)}
        for found in self._encoded:
            if files and files <= {file.name for file in found.files} and not any(map(found.is_changed, found.files)):
                return found
        if store is not None and not files:
            return store
        return self._encode(names)

    def _encode(self, names: list[str]) -> Collection:
        checkpoint, options = self.session.checkpoint, self.session.options
        if self.store is None:
            revision = f"@{checkpoint.revision}" if checkpoint.revision else ""
            options = replace(options, model=options.model or f"{checkpoint.name}{revision}")
        found = with_files(
            self.store, names, options, has_flags=False, quiet=self.quiet, progress=self.progress, limits=self.limits
        )
        self.keep(found)
        return found

    def keep(self, found: Collection) -> None:
        """Keep files that were encoded, should they be asked about again."""
        from qvsplit.on_demand import FilesAtHand

        if isinstance(found, FilesAtHand):
            self._encoded = [*self._encoded, found][-_MOST_ENCODED:]

    # ------------------------------------------------------------------------------------------------------- names

    def listed(self, name: str, most: int = MOST_LISTED) -> tuple[list[str], int]:
        """Give the names of the first images that can be asked about, of those that `name` names, and their number."""
        found = self.session.store
        if not name:
            return _names(islice(found, most)), len(self.store) if self.store is not None else len([*found])
        rows = [row for row in found.matching(self._meant(name)) if row.status == "ok"]
        if not rows:
            raise UsageError(f"{name} matches none of the images that can be asked about{found.hint(name)}")
        return _names(rows[:most]), len(rows)

    def suggestions(self, text: str, files: bool) -> list[str]:
        """Give names that contain `text`, some of the store's, and with `files` paths on disk that begin so."""
        found: dict[str, None] = {}
        if self.store is not None:
            keys = self.store.catalogue.names_containing(stored_name(text), MOST_SUGGESTED)
            found = dict.fromkeys(typeable(escaped(name_on_disk(path))) for _, path in keys)
        if files:
            found |= dict.fromkeys(map(typeable, islice(_files_beginning(text), MOST_SUGGESTED)))
        return list(found)


def store_of(collection: Collection) -> Store | None:
    """Give the store that is asked, or that files at hand lie beside."""
    from qvsplit.on_demand import FilesAtHand
    from qvsplit.store.store import Store

    if isinstance(collection, FilesAtHand):
        return collection.store
    return collection if isinstance(collection, Store) else None


def say_failed(rows: Sequence[Row]) -> None:
    """Say of rows why they cannot be asked about."""
    for row in rows:
        say(f"failed: {escaped(shown_name(row))} {on_command_line(failure_reason(row))}")


def readings(typed: str) -> list[str]:
    r"""Give the names that may be meant by what was typed or dropped into the terminal, the likeliest first.

    As it stands; with ~ for the home; and as a shell reads it: `'a b.jpg'` and `a\ b.jpg` are `a b.jpg`.
    """
    names = [typed]
    with suppress(ValueError):  # a quotation mark that is never closed belongs to the name
        words = shlex.split(typed)
        names += words if len(words) == 1 else []
    return list(dict.fromkeys(one for name in names for one in (name, os.path.expanduser(name))))


def typeable(name: str) -> str:
    """Give a name as `readings` takes it: in quotes where blanks at its ends would not be taken for its own."""
    return name if name == name.strip() else shlex.quote(name)


def _names(rows: Iterator[Row] | Sequence[Row]) -> list[str]:
    return [escaped(shown_name(row)) for row in rows]


def _files_beginning(text: str) -> Iterator[str]:
    """Give the folders and the images and videos whose paths begin with `text`, sorted."""
    from qvsplit.sources.folders import SUFFIXES

    folder, slash, beginning = text.rpartition("/")
    found = []
    try:
        with os.scandir(os.path.expanduser(folder + slash) or ".") as entries:
            for entry in islice(entries, _MOST_LOOKED_AT):
                name = entry.name
                if not name.startswith(beginning) or (name.startswith(".") and not beginning):
                    continue
                if entry.is_dir():
                    found.append(f"{folder}{slash}{name}/")
                elif os.path.splitext(name)[1].lower() in SUFFIXES:
                    found.append(f"{folder}{slash}{name}")
    except (OSError, ValueError):  # no folder, or one that is not to be read
        return
    yield from sorted(path for path in found if escaped(path) == path)  # only what can be typed
