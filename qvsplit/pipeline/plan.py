"""What is to be done: listings held against what the store knows. Pure functions, no I/O.

`plan` sorts what was listed, `settle` takes up what the source says of rows that no listing has, `classify` names the
change of an item once its content is known, `tallies_after` says in which folders nothing is left to do.

All that is counted here are items: a video in several parts, each with a row of its own, is one. The row that stands
for it is that of its first part, or one that failed (`store.row.item_row`); its features are there only where those of
all its parts are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from qvsplit.runtime.names import file_on_disk, is_within
from qvsplit.sources.source import Entry, Folder, Key, Listing, Presence, Scope
from qvsplit.store.catalogue import FolderTally
from qvsplit.store.row import Content, Row, item_row

Change = Literal["new", "modified", "re-encoded", "metadata changed", "moved", "copied"]
NOTHING = FolderTally("", 0, 0, 0)


class Catalogue(Protocol):
    """What the store knows, as far as a plan needs it."""

    def rows_in(self, wanted: Callable[[Folder], bool]) -> Iterable[Row]:
        """Give the current rows in those folders that are `wanted`, in any order."""

    def folder_rows(self, folder: Folder) -> Mapping[Key, tuple[Row, bool]]:
        """Give the row that stands for each item in one folder, and whether the features of all its parts are there."""

    def current(self, root: str, path: str) -> Row | None:
        """Give the row that stands for an item."""

    def rows_of(self, root: str, path: str) -> Sequence[Row]:
        """Give the current rows of an item, all its parts in order; none if there is no such item."""

    def holds(self, content: Content | None) -> bool:
        """Say whether there are features of the whole file that this content is of: of all its parts."""

    def home(self, content: Content | None) -> Row | None:
        """Give the row that holds the features of this content, which is one part of a file."""

    def home_rows(self, sha256: str | None) -> Sequence[Row]:
        """Give the rows that hold the features of all parts of a file's content, by part; none where one is missing."""


@dataclass(frozen=True)
class Cures:
    """What may cure a failure without a change of the file.

    Attributes:
        readers: Formats that an optional library reads here.
        item_timeout: Seconds that each step of an item may take.
        memory: Bytes of this machine.
        device: As it was asked for.
        max_image_pixels: Pixels that an image may have.
    """

    readers: tuple[str, ...] = ()
    item_timeout: float = 0.0
    memory: int = 0
    device: str = ""
    max_image_pixels: int = 0

    def to_json(self) -> dict[str, object]:
        """Give it as the catalogue and a failed row keep it."""
        return {
            "readers": list(self.readers), "item_timeout": self.item_timeout, "memory": self.memory,
            "device": self.device, "max_image_pixels": self.max_image_pixels,
        }  # fmt: skip


@dataclass(frozen=True)
class PlanOptions:
    """Options of a plan."""

    retry_failed: bool = False
    checksum: bool = False  # read again also what is unchanged
    cures: Cures = Cures()


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        found: Items listed: `to_read`, `unchanged` and `failed_before` together.
        to_read: They are new, or their size and version say that they may have changed.
        unchanged: Known, by size and version.
        failed_before: Known to be bad, not tried again.
        unseen: Items that no listing has, by the rows that stand for them: the source is to say whether their file
            still exists.
        absent: Of these, once settled: those whose file does not exist. Every part of theirs is (`Catalogue.rows_of`).
        empty_folders: Of the absent: the key → the folder above it that is there and wholly empty, as the place of a
            disk is that is not mounted.
        unlisted: Folders of rows that no listing has though their file exists.
        settled: Folders that were listed out and have nothing to read: how many are ok, and how many failed before.
        excluded: Items that no listing has, as every walk leaves their file out: they stay as they are.
    """

    found: int
    to_read: tuple[Entry, ...]
    unchanged: int
    failed_before: int
    unseen: tuple[Row, ...] = ()
    absent: tuple[Row, ...] = ()
    empty_folders: Mapping[Key, str] = field(default_factory=dict)
    unlisted: frozenset[Folder] = frozenset()
    settled: Mapping[Folder, tuple[int, int]] = field(default_factory=dict)
    excluded: tuple[Row, ...] = ()


# ------------------------------------------------------------------------------------------------- before reading


def nothing_to_do(
    tallies: Mapping[Folder, FolderTally],
    unsettled: Collection[Folder],
    listings: Sequence[Listing],
    scope: Scope,
    *,
    prune: bool,
) -> FolderTally | None:
    """Add up all folders listed, if they are just as they were when nothing was left to do; else give None.

    `unsettled` are the folders with rows in which something was left to do.
    """
    if scope.empty or any(map(scope.covers, unsettled)):
        return None
    known = {listing.folder for listing in listings if listing.known}
    for listing in listings:
        before = tallies.get(listing.folder, NOTHING)
        if not listing.known and (listing.lines or before.digest or before.excluded):
            return None
    ok = failed = not_found = excluded = 0
    for folder, tally in tallies.items():
        if scope.covers(folder):
            # a listing does not show whether the file of an excluded item is still there
            may_prune = prune and (tally.not_found or tally.excluded)
            if may_prune or (tally.digest and folder not in known):
                return None
            ok, failed = ok + tally.ok, failed + tally.failed
            not_found, excluded = not_found + tally.not_found, excluded + tally.excluded
    return FolderTally("", ok, failed, not_found, excluded)


def plan(
    listings: Sequence[Listing],
    scope: Scope,
    catalogue: Catalogue,
    tallies: Mapping[Folder, FolderTally],
    options: PlanOptions = PlanOptions(),
) -> Plan:
    """Sort what was listed into known and to be read. `tallies` has the folders whose listing is `known`.

    Only rows below the paths that were listed can be absent; of a path in which nothing at all was found none is, as
    that is more often a disk that is not mounted.
    """
    sorter = _Sorter(options)
    settled = {}
    unseen: dict[Key, Row] = {}
    seen: set[Key] = set()  # in folders of which some files were also named by themselves
    partly = {listing.folder for listing in listings if not listing.complete}
    for listing in listings:
        if not listing.lines:
            continue
        rows = dict(catalogue.folder_rows(listing.folder))
        before = sorter.number, sorter.unchanged, sorter.failed_before
        for entry in listing.entries():
            row, held = rows.pop(entry.key, (None, False))
            sorter.add(entry, row, held=held)
            if listing.folder in partly:
                seen.add(entry.key)
        unseen |= {key: row for key, (row, _) in rows.items()}
        if sorter.number == before[0]:
            settled[listing.folder] = (sorter.unchanged - before[1], sorter.failed_before - before[2])
    known = [listing.folder for listing in listings if listing.known]
    looked_at = {listing.folder for listing in listings if listing.lines}
    looked_at |= {folder for folder in known if not (tallies[folder].not_found or tallies[folder].excluded)}
    alive = [start for start in scope.starts if start not in scope.empty]

    def may_lack(folder: Folder) -> bool:
        place = file_on_disk(*folder).rstrip("/") or "/"
        return folder not in looked_at and any(is_within(place, one) or is_within(one, place) for one in alive)

    def is_below(row: Row) -> bool:
        return any(is_within(file_on_disk(row.root, row.path), start) for start in alive)

    rows_of: dict[Key, list[Row]] = {}
    for row in catalogue.rows_in(may_lack):
        rows_of.setdefault(row.key, []).append(row)
    unseen |= {key: item_row(parts) for key, parts in rows_of.items()}
    for key in seen:
        unseen.pop(key, None)
    return Plan(
        found=sum(listing.number for listing in listings),
        to_read=tuple(sorter.to_read),
        unchanged=sorter.unchanged + sum(tallies[folder].ok for folder in known),
        failed_before=sorter.failed_before + sum(tallies[folder].failed for folder in known),
        unseen=tuple(
            unseen[key] for key in sorted(unseen) if unseen[key].status != "deleted" and is_below(unseen[key])
        ),
        settled=settled,
    )


def settle(
    planned: Plan,
    presence: Mapping[Key, Presence],
    listings: Sequence[Listing],
    catalogue: Catalogue,
    options: PlanOptions = PlanOptions(),
) -> Plan:
    """Take up what the source says of the rows that no listing has.

    A file that exists though no listing has it was named by itself once, or met under another name; it is counted and
    sorted like any other, unless its folder is known and so counted already. One that is excluded now is counted apart.
    """
    counted = {listing.folder for listing in listings if listing.known}
    sorter = _Sorter(options)
    absent, unlisted, excluded, empty_folders = [], [], [], {}
    for row in planned.unseen:
        found = presence[row.key]
        if found.state == "absent" or found.empty_folder is not None:
            absent.append(row)
            if found.empty_folder is not None:
                empty_folders[row.key] = found.empty_folder
        elif found.is_excluded:
            excluded.append(row)
        elif found.entry is not None and row.folder not in counted:
            unlisted.append(row.folder)
            now = catalogue.current(*row.key)
            sorter.add(found.entry, now, held=now is not None and catalogue.holds(now.content))
    return replace(
        planned,
        found=planned.found + len(unlisted),
        to_read=planned.to_read + tuple(sorter.to_read),
        unchanged=planned.unchanged + sorter.unchanged,
        failed_before=planned.failed_before + sorter.failed_before,
        absent=tuple(absent),
        empty_folders=empty_folders,
        unlisted=frozenset(unlisted),
        excluded=tuple(excluded),
    )


class _Sorter:
    """Sorts entries one by one. What is tried again comes behind what is new: a run cut short gets to that."""

    def __init__(self, options: PlanOptions) -> None:
        self._options = options
        self._changed: list[Entry] = []
        self._again: list[Entry] = []
        self.unchanged = self.failed_before = 0

    @property
    def to_read(self) -> Sequence[Entry]:
        return [*self._changed, *self._again]

    @property
    def number(self) -> int:
        return len(self._changed) + len(self._again)

    def add(self, entry: Entry, row: Row | None, *, held: bool) -> None:
        """Sort one, for which `row` stands, and of which is known whether the features of all its parts are `held`."""
        if row is None or not is_known(row, entry, lambda _: held):
            self._changed.append(entry)
        elif self._options.checksum or (row.status == "failed" and self._is_tried_again(row, entry)):
            self._again.append(entry)
        elif row.status == "failed":
            self.failed_before += 1
        else:
            self.unchanged += 1

    def _is_tried_again(self, row: Row, entry: Entry) -> bool:
        return self._options.retry_failed or may_be_cured(row, self._options.cures, readable=entry.readable)


def is_known(row: Row, entry: Entry, held: Callable[[Content | None], bool]) -> bool:
    """Say whether size and version alone show that the item has not changed. A row without version proves nothing.

    `row` stands for the item, and `held` says of a content whether the store has the features of the whole file.
    """
    if row.status == "deleted" or row.version is None or (row.size, row.version) != (entry.size, entry.version):
        return False
    # else its features went with a shard that no longer exists
    return row.status == "failed" or held(row.content)


def may_be_cured(row: Row, cures: Cures, *, readable: bool = False) -> bool:
    """Say whether what made a row fail has changed since, so that it is tried again by itself.

    Args:
        row: That failed.
        cures: What this run can read, and under which limits.
        readable: Whether this process may read the file.
    """
    if row.error_kind == "permission":
        return readable
    try:
        before = json.loads(row.media or "{}")["cures"]
        if row.error_kind == "reader-missing":
            return bool(set(cures.readers) - set(before["readers"]))
        if row.error_kind == "timeout":
            return bool(cures.item_timeout > before["item_timeout"])
        if row.error_kind == "memory":
            more = cures.max_image_pixels > before.get("max_image_pixels", 0)
            return bool(more or cures.memory > before["memory"] or cures.device != before["device"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return False


def failure_now(row: Row, readers: tuple[str, ...], memory: int, *, readable: bool) -> str:
    """Give why a row failed, without advice that has been followed already.

    Args:
        row: That failed.
        readers: The libraries that read images here now.
        memory: Bytes of this machine.
        readable: Whether this process may read the file.
    """
    error = row.error or ""
    try:
        before = json.loads(row.media or "{}").get("cures", {})
        now = Cures(
            readers, before.get("item_timeout", 0.0), memory, before.get("device", ""),
            before.get("max_image_pixels", 0),
        )  # fmt: skip
    except (ValueError, AttributeError, RecursionError):
        return error
    # a file that may be read and failed all the same did so for another reason: see `Entry.readable`
    if may_be_cured(row, now, readable=readable and row.version is not None):
        return "failed for a reason that has changed since; the next `qvsplit extract` tries it again"
    return error


# ------------------------------------------------------------------------------------------------- after reading


def classify(current: Row | None, content: Content, *, held: bool, moved: bool) -> Change:
    """Name what has happened to an item, now that its content is known.

    Args:
        current: The row that stood for the item so far.
        content: What was read; which part of it makes no difference.
        held: Whether the store, or this run, has the features of the whole file already.
        moved: Whether an item of this content has lost its file.
    """
    same = current is not None and current.status == "ok" and current.sha256 == content[0]
    if held:
        if same:
            return "metadata changed"
        return "moved" if moved else "copied"
    if current is None or current.status == "deleted":
        return "new"
    return "modified" if current.status == "ok" and not same else "re-encoded"


def tallies_after(
    planned: Plan,
    listings: Sequence[Listing],
    scope: Scope,
    before: Mapping[Folder, FolderTally],
    current: Callable[[Key], Row | None],
    held: Callable[[Content | None], bool],
    touched: Collection[Folder] = (),
) -> Mapping[Folder, FolderTally]:
    """Give the folders in which nothing is left to do: of these listings, and of other paths before them.

    Args:
        planned: The settled plan.
        listings: What was listed.
        scope: Where.
        before: The tallies so far.
        current: The row that stands for an item after the run.
        held: Whether there are features of the whole file that a content is of, after the run.
        touched: Folders of the rows that the run has written.
    """
    not_found: dict[Folder, int] = {}
    for row in planned.absent:
        now = current(row.key)
        if now is not None and now.status != "deleted":
            not_found[row.folder] = not_found.get(row.folder, 0) + 1
    excluded: dict[Folder, int] = {}
    for row in planned.excluded:
        excluded[row.folder] = excluded.get(row.folder, 0) + 1
    # of other paths; a file of such a folder that was named by itself may be one that no walk lists
    tallies = {one: tally for one, tally in before.items() if not scope.covers(one) and one not in touched}
    for listing in listings:
        missing, left_out = not_found.pop(listing.folder, 0), excluded.pop(listing.folder, 0)
        if listing.known:
            tallies[listing.folder] = replace(before[listing.folder], not_found=missing, excluded=left_out)
        elif listing.folder in planned.settled and listing.complete:
            tallies[listing.folder] = FolderTally(listing.digest, *planned.settled[listing.folder], missing, left_out)
        elif (tally := _tally(listing, missing, left_out, current, held)) is not None:
            tallies[listing.folder] = tally
    for folder in not_found.keys() | excluded.keys():
        tallies[folder] = FolderTally("", 0, 0, not_found.get(folder, 0), excluded.get(folder, 0))
    # no listing has this digest: such a folder is listed out every time
    return tallies | dict.fromkeys(planned.unlisted, FolderTally("unlisted", 0, 0, 0))


def _tally(
    listing: Listing,
    not_found: int,
    excluded: int,
    current: Callable[[Key], Row | None],
    held: Callable[[Content | None], bool],
) -> FolderTally | None:
    """Give None where something is left to do in that folder, or only some of its files were looked at."""
    if not listing.complete or not (listing.lines or not_found or excluded):
        return None
    count = {"ok": 0, "failed": 0}
    for entry in listing.entries():
        row = current(entry.key)
        if row is None or not is_known(row, entry, held):
            return None
        count[row.status] += 1
    return FolderTally(listing.digest, count["ok"], count["failed"], not_found, excluded)
