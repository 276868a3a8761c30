"""Which images a prompt loop asks about: of a store, of files at hand, and those that are named while it runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

from qvsplit.commands.ask_files import LIMITS, Limits, with_files
from qvsplit.commands.wording import on_command_line
from qvsplit.errors import UsageError, escaped, some_of
from qvsplit.output.names import shown_name
from qvsplit.output.text import say
from qvsplit.output.verdicts import failure_reason
from qvsplit.runtime.names import name_on_disk, stored_name

if TYPE_CHECKING:
    from qvsplit.answering.collection import Collection
    from qvsplit.answering.selection import Selection
    from qvsplit.ask import PromptItems, Session
    from qvsplit.on_demand import FilesAtHand
    from qvsplit.store.row import Row
    from qvsplit.store.store import Store

MOST_SUGGESTED = 30  # that a key completes, of a store and of a folder each
MOST_LISTED = 20
_MOST_LOOKED_AT = 10_000  # files of a folder
_MOST_FILES = 8  # whose features are kept, should they be asked about again


@dataclass
class Asked:
    """What is asked, and what it can be changed to.

    Attributes:
        session: What answers: the collection, system message and engine of now.
        prompts: How selected rows stand in prompts.
        items: The prompts of the images that are asked about.
        quiet: Whether nothing is said but failures.
        progress: How encoding is shown.
        limits: What a file may take that is encoded.
    """

    session: Session
    prompts: Callable[[Selection], list[PromptItems]]
    items: list[PromptItems]
    quiet: bool = False
    progress: str = "auto"
    limits: Limits = LIMITS
    _files: dict[str, FilesAtHand] = field(default_factory=dict)  # by name

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

    def forget(self) -> None:
        """Ask as if nothing had been asked before."""
        self.items = [replace(one, earlier=()) for one in self.items]

    def choose(self, name: str) -> None:
        """Ask about what `name` names or, as a glob, matches; or about a file, which is encoded if no store has it.

        Raises:
            QvsplitError: It names nothing that can be asked about; all stays as it was.
        """
        from qvsplit.answering.selection import select

        found = self._collection(name := as_name(name))
        if not found.matching(name) and (like := self.suggestions(name, False)):
            raise UsageError(f"no image is named {name}; some have it in their names: {some_of(like, 3)}")
        selection = select(found, [name])
        items = self.prompts(selection)
        say_failed(selection.failed)
        if not items:
            raise UsageError(f"{name} cannot be asked about")
        if found is not self.session.store:
            self.session = self.session.over(found, system=self.system)
        self.items = items

    def _collection(self, name: str) -> Collection:
        """Give what has the items of this name: the store, or a file that is none of its items."""
        from qvsplit.on_demand import is_file

        store = self.store
        if not is_file(name):
            if store is None:
                raise UsageError(f"{name}: there is no such file")
            return store
        if name in self._files and not any(self._files[name].is_changed(file) for file in self._files[name].files):
            return self._files[name]
        checkpoint, asked = self.session.checkpoint, self.session.options
        if store is None:
            revision = f"@{checkpoint.revision}" if checkpoint.revision else ""
            asked = replace(asked, model=asked.model or f"{checkpoint.name}{revision}")
        found = with_files(
            store, [name], asked, has_flags=False, quiet=self.quiet, progress=self.progress, limits=self.limits
        )
        self.keep(found)
        return found

    def keep(self, found: Collection) -> None:
        """Keep files that were encoded, should they be asked about again."""
        from qvsplit.on_demand import FilesAtHand

        if isinstance(found, FilesAtHand):
            self._files |= {file.name: found for file in found.files}
            for name in [*self._files][:-_MOST_FILES]:
                del self._files[name]

    # ------------------------------------------------------------------------------------------------------- names

    def listed(self, name: str, most: int = MOST_LISTED) -> tuple[list[str], int]:
        """Give the names of the first images that can be asked about, of those that `name` names, and their number."""
        found = self.session.store
        if not name:
            return _names(islice(found, most)), len(self.store) if self.store is not None else len([*found])
        rows = [row for row in found.matching(as_name(name)) if row.status == "ok"]
        if not rows:
            raise UsageError(f"{name} matches none of the images that can be asked about{found.hint(name)}")
        return _names(rows[:most]), len(rows)

    def suggestions(self, text: str, files: bool) -> list[str]:
        """Give names that contain `text`, some of the store's, and with `files` paths on disk that begin so."""
        found: dict[str, None] = {}
        if self.store is not None:
            keys = self.store.catalogue.names_containing(stored_name(text), MOST_SUGGESTED)
            found = dict.fromkeys(escaped(name_on_disk(path)) for _, path in keys)
        if files:
            found |= dict.fromkeys(islice(_files_beginning(text), MOST_SUGGESTED))
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


def as_name(typed: str) -> str:
    """Give the name that was typed: with ~ for the home, and with quotes as terminals put around a file dropped in."""
    name = typed.strip()
    if len(name) > 2 and name[0] == name[-1] and name[0] in "'\"":
        name = name[1:-1]
    return os.path.expanduser(name)


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
