"""extract_files: bring a store up to date with the files under some paths.

Wires source, plan, runner, encoder and store together: list → plan → run the stages → write rows. The shards are read
only if the folder index of the last run cannot say that nothing is to be done; the encoder is loaded when the first
item needs it, and not before.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from qvsplit.errors import ConfigError, QvsplitError, ShardDamaged, StoreDamaged, UsageError, some_of
from qvsplit.pipeline.options import ExtractOptions, check_against, check_options, like
from qvsplit.pipeline.plan import Cures, Plan, PlanOptions, nothing_to_do, plan, settle, tallies_after
from qvsplit.pipeline.summary import ExtractCallbacks, Summary
from qvsplit.runtime.atomic_files import disk_errors
from qvsplit.runtime.interrupts import held_back
from qvsplit.runtime.memory import machine_memory, peak_memory
from qvsplit.runtime.names import is_within, name_on_disk
from qvsplit.sources.folders import SUFFIXES, LocalFolders
from qvsplit.sources.images import optional_readers
from qvsplit.sources.source import Folder, Listing, Source
from qvsplit.store import history, layout, rebuild
from qvsplit.store.folder_index import FolderIndex, FolderTally, read_index, write_index
from qvsplit.store.generation import claim_generation
from qvsplit.store.repair import damage_marks, repair
from qvsplit.store.row_cache import write_rows
from qvsplit.store.shard_reader import Shard
from qvsplit.store.shards import next_number, placed_from, refuse_half_placed, shards_in
from qvsplit.store.storage import LocalStorage, Storage
from qvsplit.store.store import Store, read_store

if TYPE_CHECKING:
    from qvsplit.pipeline.execution import Execution, Target
    from qvsplit.store.lock import Lock


@dataclass(frozen=True)
class _Call:
    """The arguments of one call."""

    paths: Sequence[str | PathLike[str]]
    storage: Storage
    options: ExtractOptions
    callbacks: ExtractCallbacks
    cures: Cures
    began: float  # by time.perf_counter()
    clock: float  # by time.time()
    seconds: dict[str, float]  # what was spent before there is a summary, by stage


@dataclass(frozen=True)
class _View:
    """What is known before a plan is made.

    Attributes:
        index: The folder index of the last run, if it can be trusted.
        store: The store; None as long as the index does for it.
        repaired: Damaged shards that were quarantined; None where that was not looked into.
        source: Where items come from.
        listings: What it lists.
    """

    index: FolderIndex | None
    store: Store | None
    repaired: int | None
    source: Source
    listings: Sequence[Listing]

    @property
    def tallies(self) -> Mapping[Folder, FolderTally]:
        return self.index.folders if self.index else {}


def extract_files(
    paths: Sequence[str | PathLike[str]],
    *,
    out: str | PathLike[str] = "embeds",
    options: ExtractOptions | None = None,
    callbacks: ExtractCallbacks | None = None,
) -> Summary:
    """Bring the store `out` up to date with the files under `paths`.

    On KeyboardInterrupt the rows so far are kept and the summary, marked `interrupted`, is on the exception as
    `qvsplit_summary`; so it is on a QvsplitError if anything was begun, and what was finished stays.

    Args:
        paths: Folders, which are walked, and files.
        out: The store: a folder of shards, created if need be.
        options: See `ExtractOptions`.
        callbacks: Who hears of what goes on.

    Raises:
        QvsplitError: The run cannot go on.
    """
    began, options = time.perf_counter(), options or ExtractOptions()
    check_options(options)
    if any(os.path.realpath(out) == os.path.realpath(path) for path in paths):
        raise UsageError(f"{fspath(out)} is itself the folder of images; give another store, it may be inside")
    storage, callbacks = LocalStorage(Path(out)), callbacks or ExtractCallbacks()
    call = _Call(paths, storage, options, callbacks, current_cures(options), began, time.time(), {})
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks on odd metadata; sizes have our own limit

        def locked() -> Lock:
            return stack.enter_context(storage.lock(wait=options.wait, on_note=callbacks.on_note))

        exists = (storage.folder / layout.LOCK).exists()
        lock = locked() if exists and not options.dry_run else None  # before the store is read
        view = _look(call, lock)
        summary = _nothing_to_do(call, view)
        if summary is not None:
            return summary
        if lock is None and not options.dry_run:  # a new store: created now that there is something for it
            lock = locked()
        return _go(call, view, lock)


def current_cures(options: ExtractOptions) -> Cures:
    """Say what this run can read, and under which limits: failures are tried again where that has changed."""
    return Cures(optional_readers(), options.item_timeout, machine_memory(), options.device or "")


# ---------------------------------------------------------------------------------------------------------- looking


def _look(call: _Call, lock: Lock | None) -> _View:
    """List, with what the last run's index knows; without it, the store is read first."""
    began = time.perf_counter()
    with disk_errors(call.storage.location):
        shards = shards_in(call.storage)
    index = None
    everything = call.options.checksum or call.options.rebuild
    if shards and not everything and placed_from(call.storage) is None and not damage_marks(call.storage):
        index = read_index(call.storage, shards)
        if index is not None and index.cures != call.cures.to_json():
            index = None  # what failed before may be read now
    store, repaired = (None, None) if index is not None else _opened(call, lock)
    view = _listed(call, index, store, repaired)
    if not sum(listing.number for listing in view.listings):
        _refuse_nothing(call, view)
    call.seconds["scan"] = time.perf_counter() - began
    return view


def _opened(call: _Call, lock: Lock | None) -> tuple[Store, int | None]:
    """Open the store: as it is on disk, repaired, where we hold the lock; else as anybody may read it."""
    if lock is None:
        return _read_unlocked(call), None
    rebuild.finish(call.storage)
    model_named = call.options.model is not None
    return repair(call.storage, lock, call.callbacks.on_note, model_named=model_named)


def _read_unlocked(call: _Call) -> Store:
    """Read what can be read. What is damaged is left out: whoever holds the lock quarantines it."""
    if call.options.dry_run:
        refuse_half_placed(call.storage)
    shards = []
    with disk_errors(call.storage.location):
        names = shards_in(call.storage)
    for name in names:
        try:
            shards.append(Shard(call.storage, name))
        except ShardDamaged:
            if call.options.dry_run:
                raise
    return Store(shards)


def _listed(call: _Call, index: FolderIndex | None, store: Store | None, repaired: int | None) -> _View:
    """List what there is; folders are known by their digest where nothing was left to do in them."""
    if index is not None:
        roots = index.roots_on_disk
    else:
        assert store is not None  # read, as there is no index
        roots = frozenset(map(name_on_disk, store.roots))
    source = LocalFolders(
        call.paths, out=os.path.realpath(call.storage.location), roots=roots, on_note=call.callbacks.on_note
    )
    again = call.options.retry_failed
    known = {
        folder: tally.digest
        for folder, tally in (index.folders if index else {}).items()
        if tally.digest and not (again and tally.failed)
    }
    return _View(index, store, repaired, source, list(source.list(known)))


def _refuse_nothing(call: _Call, view: _View) -> None:
    """UsageError where no path holds an item: that is more often a mistake, or a disk that is not mounted."""
    if view.index is not None:
        counts = {f"{root}/{path}": one.ok + one.failed for (root, path), one in view.index.folders.items()}
    else:
        assert view.store is not None
        counts = {f"{row.root}/{row.path}": 1 for row in view.store.rows if row.status != "deleted"}
    for start in view.source.scope.empty:
        number = sum(count for name, count in counts.items() if is_within(name_on_disk(name).rstrip("/"), start))
        if number:
            raise UsageError(_no_items_any_more(start, number))
    raise UsageError(
        f"no images in {', '.join(fspath(path) for path in call.paths)} (looked for {some_of(SUFFIXES, 40)}); nothing "
        "was changed"
    )


def _no_items_any_more(start: str, number: int) -> str:
    return (
        f"{start} holds no images any more; its {number:,} rows are left as they are, in case it is not mounted (if "
        "they were deleted, `qvsplit purge` takes them out)"
    )


def _nothing_to_do(call: _Call, view: _View) -> Summary | None:
    """Give the summary, if the index alone shows that there is nothing to do."""
    if view.index is None:
        return None
    total = nothing_to_do(view.index, view.listings, view.source.scope, prune=call.options.prune)
    if total is None:
        return None
    check_against(call.options, view.index.config, call.storage.location)
    if call.options.model is not None:
        from qvsplit.pipeline.devices import check_model

        check_model(call.options, view.index.config, view.index.provenance)
    call.callbacks.on_plan(0)
    found = sum(listing.number for listing in view.listings)
    summary = Summary(found=found, unchanged=total.ok, failed_before=total.failed, not_found=total.not_found)
    return _finished(call, summary)


# ------------------------------------------------------------------------------------------------------------ doing


def _go(call: _Call, view: _View, lock: Lock | None) -> Summary:
    """Find out from the store what is to be done, and do it. Without a lock it is only said."""
    if lock is not None and view.repaired is None:
        view = _repaired(call, view, lock)
    store = view.store or _read_unlocked(call)
    if store.config is not None and not call.options.rebuild:
        check_against(call.options, store.config, call.storage.location)
    planned = _planned(call, view, store)
    if call.options.rebuild and lock is not None:
        return _rebuild(call, view, store, planned, lock)
    from qvsplit.pipeline.devices import check_model

    check_model(call.options, store.config, store.provenance)  # all that is to be read may turn out to be known
    summary = _summary_of(planned, view.repaired or 0)
    if lock is None:
        from qvsplit.pipeline.preview import preview

        summary.preview = preview(planned.to_read, store, call.storage, call.options)
        return _finished(call, summary)
    call.callbacks.on_plan(len(planned.to_read))
    execution = _execute(call, planned, summary, _target(call, store, planned, lock))
    _write_caches(call, view, planned, execution)
    return _noted(call, summary)


def _repaired(call: _Call, view: _View, lock: Lock) -> _View:
    """Take up the store as it is on disk now that it is locked; list again where the listing hung on what has gone."""
    store, repaired = _opened(call, lock)
    roots_changed = view.store is not None and view.store.roots != store.roots
    if (view.index is not None and repaired) or roots_changed:
        return _listed(call, None, store, repaired)
    return replace(view, store=store, repaired=repaired)


def _planned(call: _Call, view: _View, store: Store) -> Plan:
    """Hold the listings against the store, and look for what no listing has."""
    options = PlanOptions(call.options.retry_failed, call.options.checksum, call.cures)
    scope = view.source.scope
    for start in scope.empty:
        number = sum(row.status != "deleted" and is_within(f"{name_on_disk(row.root)}/{name_on_disk(row.path)}", start)
                     for row in store.rows)  # fmt: skip
        if number:
            call.callbacks.on_note(_no_items_any_more(start, number))
    planned = plan(view.listings, scope, store, view.tallies, options)
    presence = view.source.stat([row.key for row in planned.unseen])
    return settle(planned, presence, view.listings, store, options)


def _summary_of(planned: Plan, repaired: int) -> Summary:
    return Summary(
        found=planned.found, unchanged=planned.unchanged, failed_before=planned.failed_before,
        to_read=len(planned.to_read), not_found=len(planned.absent), repaired=repaired,
    )  # fmt: skip


def _target(call: _Call, store: Store, planned: Plan, lock: Lock, *, into: Storage | None = None, first: int = 1,
            highest: int = 0) -> Target:  # fmt: skip
    """Say where rows go; the generation is claimed where there is something to write."""
    from qvsplit.pipeline.execution import Target

    deletes = call.options.prune and any(row.key not in planned.empty_folders for row in planned.absent)
    writes = bool(planned.to_read) or deletes
    generation = claim_generation(call.storage, max(store.generation, highest)) if writes else 0
    return Target(into or call.storage, store, lock, generation, first, call.cures)


def _execute(call: _Call, planned: Plan, summary: Summary, target: Target) -> Execution:
    """Carry out the plan; whatever ends it, the summary so far goes with the error and into the history."""
    from qvsplit.pipeline.execution import Execution

    execution = Execution(planned, target, call.options, summary, call.callbacks)
    try:
        execution.run()
    except KeyboardInterrupt as interrupt:
        summary.interrupted = True
        done = interrupt.qvsplit_summary = _finished(call, summary)  # type: ignore[attr-defined]
        history.add_run(call.storage, call.clock, done.to_json())
        raise
    except QvsplitError as error:
        done = error.qvsplit_summary = _finished(call, summary)  # type: ignore[attr-defined]
        history.add_run(call.storage, call.clock, done.to_json() | {"error": type(error).__name__})
        raise
    return execution


def _noted(call: _Call, summary: Summary) -> Summary:
    """Finish the summary, and note it in the history if there is something to say."""
    summary = _finished(call, summary)
    if summary.did_anything:
        history.add_run(call.storage, call.clock, summary.to_json())
    return summary


def _finished(call: _Call, summary: Summary) -> Summary:
    summary.store = call.storage.location
    summary.stages = {name: round(seconds, 3) for name, seconds in (call.seconds | summary.stages).items()}
    summary.seconds = round(time.perf_counter() - call.began, 3)
    summary.peak_memory_bytes = peak_memory()
    return summary


def _write_caches(call: _Call, view: _View, planned: Plan, execution: Execution) -> None:
    """Leave what the next run needs to know to have nothing to do, if anything in it has changed."""
    recorder, schema = execution.recorder, execution.schema
    if schema is None:
        return
    touched = {row.folder for row in recorder.written.values()}
    tallies = tallies_after(
        planned, view.listings, view.source.scope, view.tallies, recorder.current, recorder.holds, touched
    )
    if view.index is not None and tallies == view.tallies and not recorder.written:
        return
    with disk_errors(call.storage.location):
        shards = shards_in(call.storage)
    store_roots = view.store.roots if view.store is not None else frozenset()
    roots = store_roots | {root for root, _ in recorder.written}
    index = FolderIndex(schema.config, schema.provenance[-1], tallies, frozenset(roots), call.cures.to_json())
    write_index(call.storage, shards, index)
    write_rows(call.storage, shards)


# ---------------------------------------------------------------------------------------------------------- rebuild


def _rebuild(call: _Call, view: _View, old: Store, found: Plan, lock: Lock) -> Summary:
    """Make the store again, beside the old one, which it replaces once it is whole."""
    if old.config is None or old.provenance is None:
        raise UsageError(f"{call.storage.location} has no shards yet: there is nothing to rebuild; leave --rebuild out")
    _refuse_loss(call, view, old, found)
    call = replace(call, options=like(old.config, old.provenance, call.options))
    lock.announce()
    new = rebuild.begin(call.storage)
    store = _staged(call, new)
    view = replace(view, index=None, store=store)
    planned = plan(view.listings, view.source.scope, store, {}, PlanOptions(call.options.retry_failed))
    summary = _summary_of(planned, 0)
    summary.not_found = 0
    call.callbacks.on_plan(len(planned.to_read))
    target = _target(call, store, planned, lock, into=new, first=next_number(call.storage), highest=old.generation)
    execution = _execute(call, planned, summary, target)
    if not shards_in(new):
        raise UsageError("no image was left to rebuild from; the store is as it was")
    if not summary.remaining:
        with held_back():
            rebuild.put_in_place(call.storage)
        _write_caches(call, view, planned, execution)
    return _noted(call, summary)


def _refuse_loss(call: _Call, view: _View, old: Store, found: Plan) -> None:
    """UsageError where a rebuild would drop an item of which nobody has said that it may go."""
    outside = rebuild.roots_left_out(old.rows, view.source.scope.starts)
    if outside:
        raise UsageError(
            f"{call.storage.location} also holds images in {some_of(outside)}, which --rebuild would lose; give that "
            "path too, or take them out with `qvsplit purge`"
        )
    seen = {entry.key for listing in view.listings for entry in listing.entries()}
    seen |= {entry.key for entry in found.to_read}
    if call.options.prune:
        seen |= {row.key for row in found.absent if row.key not in found.empty_folders}
    lost = [row.path for row in old if row.key not in seen]
    if lost:
        raise UsageError(
            f"{len(lost):,} images of the store cannot be found now ({some_of(lost, 3)}), and --rebuild would drop "
            "them; mount what is not mounted, or give --prune to drop what was deleted"
        )


def _staged(call: _Call, new: Storage) -> Store:
    """Give what an unfinished rebuild has already, if it was under these options; else that is given up."""
    from qvsplit.pipeline.devices import check_model

    try:
        store = read_store(new)
        if store.config is not None:
            check_against(call.options, store.config, call.storage.location)
        check_model(replace(call.options, rebuild=False), store.config, store.provenance)
    except (StoreDamaged, ConfigError) as error:
        call.callbacks.on_note(f"the unfinished rebuild is given up, and begun again: {error}")
        rebuild.discard(call.storage)
        rebuild.begin(call.storage)
        return Store([])
    return store
