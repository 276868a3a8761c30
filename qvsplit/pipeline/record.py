"""Results to rows: each item of a run is written once, all its parts together, counted once and reported once.

Rows go to the writer as soon as they are known, in any order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from qvsplit.errors import ItemError, ItemNotFound
from qvsplit.pipeline.items import Known, Result, Staged
from qvsplit.pipeline.parts import Part
from qvsplit.pipeline.plan import Catalogue, Change, Cures, Plan, classify
from qvsplit.pipeline.rows import encoded_rows, row_of, unseen
from qvsplit.pipeline.summary import ExtractCallbacks, Summary, Timer
from qvsplit.runtime.interrupts import held_back
from qvsplit.sources.files import CHANGED
from qvsplit.sources.source import Entry
from qvsplit.store.features import Features
from qvsplit.store.row import (
    Content,
    Key,
    Row,
    deleted_row,
    is_whole,
    item_row,
)  # fmt: skip


class Writer(Protocol):
    """What rows are written to."""

    def append_item(self, parts: Iterable[tuple[Row, Features | None]]) -> list[Row]:
        """Append all rows of one item, by part; gives them as they were written."""


class RowRecorder:
    """Turns the results of one run into rows.

    Args:
        catalogue: What the store knew before the run.
        planned: The settled plan.
        generation: That of every row of this run.
        writer: Gives what rows are written to; opened when the first row is written.
        summary: Where everything is counted.
        callbacks: Who hears of it.
        cures: What the run could read, and under which limits.

    Attributes:
        written: The rows of this run that stand for their items, by item.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        planned: Plan,
        generation: int,
        writer: Callable[[], Writer],
        summary: Summary,
        callbacks: ExtractCallbacks,
        cures: Cures = Cures(),  # noqa: B008 - frozen
    ) -> None:
        self.written: dict[Key, Row] = {}
        self._catalogue = catalogue
        self._plan = planned
        self._generation = generation
        self._writer = writer
        self._summary = summary
        self._callbacks = callbacks
        self._cures = cures
        self._homes: dict[Content, Sequence[Row]] = {}  # the rows, by part, of contents encoded by this run
        self._waiting: dict[Content, list[Result]] = {}  # items of the same bytes as one that is in flight
        self._failed: dict[Content, ItemError] = {}
        self._absent: dict[Content, list[Row]] = {}  # rows whose file does not exist: where moves come from
        self._moved: set[Key] = set()
        for row in planned.absent:
            if row.status == "ok" and row.content is not None:
                self._absent.setdefault(row.content, []).append(row)

    def holds(self, content: Content | None) -> bool:
        """Say whether the store, or this run, has features of this content."""
        return content in self._homes or self._catalogue.holds(content)

    def current(self, key: Key) -> Row | None:
        """Give the row that stands for an item as it is now."""
        return self.written.get(key) or self._catalogue.current(*key)

    def _home_rows(self, content: Content | None) -> Sequence[Row]:
        """Give the rows, by part, that hold the features of a file's content."""
        if content is None:
            return []
        return self._homes.get(content) or self._catalogue.home_rows(content[0])

    def take(self, result: Result) -> None:
        """Write the row of one result, and of those that waited for its features."""
        self._summary.add_seconds(result.seconds)
        outcome, content = result.outcome, result.content
        if isinstance(outcome, ItemNotFound):
            self._summary.disappeared += 1
            self._summary.remaining -= 1
            self._callbacks.on_item(result.entry.path)
        elif isinstance(outcome, ItemError):
            if content is not None and str(outcome) != CHANGED:  # which says nothing of others of those bytes
                self._failed[content] = outcome
            self._fail(result, outcome)
        elif isinstance(outcome, Staged):
            self._count_encoded(result, outcome.rows)
            self._callbacks.on_item(result.entry.path)
        elif outcome is not None and not isinstance(outcome, Known):
            self._add(result, outcome)
            self._refer_released(content)
        elif content is not None and self.holds(content):
            self._refer(result)
        else:
            assert content is not None
            self._waiting.setdefault(content, []).append(result)

    def commit(self, items: Iterable[Sequence[Row]]) -> None:
        """Take up that the shard with the rows of these items, which were staged, is in the store now."""
        for rows in items:
            self.written[rows[0].key] = item_row(rows)
            self._settle(rows)
            self._refer_released(rows[0].content)

    def to_try_again(self) -> list[Entry]:
        """Give up waiting for contents that were not encoded, for reasons that are not theirs; give what waited.

        On one machine an item is decoded as long as nobody else's features of its content are on their way. On a
        cluster it waits for another that was read before it, which may have changed since, or taken too long.
        """
        waited = [content for content in self._waiting if getattr(self._failed.get(content), "kind", "") != "content"]
        return [result.entry for content in waited for result in self._released(content)]

    def finish(self) -> None:
        """Once all results are taken: fail the items whose content failed under every name that was encoded."""
        for content in [one for one in self._waiting if one in self._failed]:
            for result in self._released(content):
                self._fail(result, self._failed[content])

    def _released(self, content: Content | None) -> list[Result]:
        return self._waiting.pop(content, []) if content is not None else []

    def _refer_released(self, content: Content | None) -> None:
        """Write the items that waited for the features of this content."""
        for one in self._released(content):
            self._refer(one)

    def _change(self, result: Result, *, held: bool) -> Change:
        assert result.content is not None
        moved = bool(self._absent.get(result.content))
        return classify(self._catalogue.current(*result.entry.key), result.content, held=held, moved=moved)

    # -------------------------------------------------------------------------------------------------- the rows

    def _add(self, result: Result, parts: list[Part]) -> None:
        """Write an item that was encoded; `parts` are taken out as they are written."""
        with held_back():  # the rows and their count are one
            rows = self._write(encoded_rows(result, parts, self._generation))
            self._settle(rows)
            self._count_encoded(result, rows)
        self._callbacks.on_item(result.entry.path)

    def _settle(self, rows: Sequence[Row]) -> None:
        """Note that the rows of an item are in the store, with its features."""
        row = rows[0]
        assert row.content is not None
        self._homes[row.content] = rows

    def _count_encoded(self, result: Result, rows: Sequence[Row]) -> None:
        change, summary, row = self._change(result, held=False), self._summary, rows[0]
        summary.encoded += 1
        summary.new += change == "new"
        summary.modified += change == "modified"
        summary.re_encoded += change == "re-encoded"
        summary.cut_off += "cut_off" in row.unseen
        summary.tokens += sum(one.n_tokens or 0 for one in rows)
        summary.remaining -= 1
        if row.kind == "video":
            summary.videos += 1
            summary.clips += len(rows)
            summary.video_seconds += row.duration or 0.0

    def _refer(self, result: Result) -> None:
        """Write an item whose features are there already, under its own or another name."""
        change = self._change(result, held=True)
        if change == "metadata changed":
            self._refresh(result)
            return
        row = row_of(result, self._generation)
        rows = [
            replace(
                row, status="ok", part=home.part, start=home.start, end=home.end, kind=home.kind, width=home.width,
                height=home.height, duration=home.duration, taken_at=home.taken_at, grid_thw=home.grid_thw,
                n_tokens=home.n_tokens, placeholder=home.placeholder, inputs=home.inputs, media=home.media,
                warnings=home.warnings or unseen(result),
            )
            for home in self._home_rows(result.content)
        ]  # fmt: skip
        assert rows, "what is known has a home"
        with held_back():
            if change == "moved":
                # the old name first: should the run die in between, the next one still finds the file new
                assert row.content is not None
                old = self._absent[row.content].pop(0)
                self._delete(old)
                self._moved.add(old.key)
                self._summary.not_found -= 1
            self._write((one, None) for one in rows)
            self._summary.moved += change == "moved"
            self._summary.copied += change == "copied"
            self._summary.cut_off += "cut_off" in rows[0].unseen
            self._summary.remaining -= 1
        self._callbacks.on_item(row.path)

    def _refresh(self, result: Result) -> None:
        """Remember new size and version, so that the file need not be read again."""
        current = self._catalogue.current(*result.entry.key)
        info = result.info
        assert current is not None
        assert info is not None
        known = (current.size, current.version) == (info.size, info.version)
        with held_back():
            if info.version is not None and not known:
                rows = self._catalogue.rows_of(*result.entry.key)
                if not is_whole(rows):  # as another writer may have left them
                    rows = self._home_rows(result.content)
                new = [
                    replace(
                        one, root=current.root, path=current.path, generation=self._generation, has_features=False,
                        size=info.size, mtime_ns=info.mtime_ns, version=info.version,
                    )
                    for one in rows
                ]  # fmt: skip
                self._write((one, None) for one in new)
            self._summary.metadata_changed += 1
            self._summary.remaining -= 1
        self._callbacks.on_item(current.path)

    def _fail(self, result: Result, error: ItemError) -> None:
        before = self._catalogue.current(*result.entry.key)
        row = replace(row_of(result, self._generation), status="failed", error=str(error), error_kind=error.kind)
        if error.kind in ("reader-missing", "timeout", "memory"):
            row = replace(row, media=json.dumps({"cures": self._cures.to_json()}, sort_keys=True))
        refused = error.kind == "permission" and not result.entry.readable
        if result.info is None and (refused or error.kind == "timeout"):  # not tried again before that has changed
            row = replace(row, version=result.entry.version)
        with held_back():
            if before is not None and before.status == "failed" and before.sha256 == row.sha256:
                self._summary.failed_again += 1
            else:
                self._summary.failed += 1
                self._callbacks.on_failure(row.path, str(error))
            if before is None or row != replace(before, generation=row.generation):
                self._write([(row, None)])
            self._summary.remaining -= 1
        self._callbacks.on_item(row.path)

    def delete_absent(self) -> None:
        """Mark items deleted whose file does not exist; not those below an empty folder, and say so."""
        left = {key: folder for key, folder in self._plan.empty_folders.items() if key not in self._moved}
        for folder in sorted(set(left.values())):
            number = sum(one == folder for one in left.values())
            self._callbacks.on_note(
                f"{folder} is empty: the {number:,} items that were below it are not marked deleted, in case a disk is "
                "not mounted there; remove the folder, or take them out with `qvsplit purge`"
            )
        for row in self._plan.absent:
            if row.key not in self._moved and row.key not in left:
                with held_back():
                    self._delete(row)
                    self._summary.deleted += 1
                    self._summary.not_found -= 1

    def _delete(self, row: Row) -> None:
        """Mark the item of a row deleted, with all its parts."""
        rows = self._catalogue.rows_of(*row.key)
        self._write((deleted_row(one, self._generation), None) for one in rows)

    def _write(self, parts: Iterable[tuple[Row, Features | None]]) -> list[Row]:
        """Write all rows of one item."""
        writer = self._writer()
        with Timer(self._summary.stages, "store"):
            rows = writer.append_item(parts)
        self.written[rows[0].key] = item_row(rows)
        return rows
