"""extract_files: bring a store up to date with the files under some paths.

Wires source, plan, runner, encoder and store together: list → plan → run the stages → write rows. The shards are read
only if the folder index of the last run cannot say that nothing is to be done; the encoder is loaded when the first
item needs it, and not before.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from qvsplit.errors import ConfigError, QvsplitError, StoreDamaged, UsageError, some_of
from qvsplit.pipeline.options import ExtractOptions, check_against, check_options, like
from qvsplit.pipeline.plan import Plan, PlanOptions, nothing_to_do, plan, settle, tallies_after
from qvsplit.pipeline.summary import ExtractCallbacks, Summary
from qvsplit.pipeline.view import Call, View, current_cures, listed, look, no_items_any_more, opened, read_unlocked
from qvsplit.runtime.atomic_files import disk_errors
from qvsplit.runtime.interrupts import held_back
from qvsplit.runtime.memory import peak_memory
from qvsplit.runtime.names import file_on_disk, is_within
from qvsplit.store import history, layout, rebuild
from qvsplit.store.folder_index import FolderIndex, write_index
from qvsplit.store.generation import claim_generation
from qvsplit.store.row_cache import write_rows
from qvsplit.store.shards import next_number, shards_in
from qvsplit.store.storage import LocalStorage, Storage
from qvsplit.store.store import Store, read_store

if TYPE_CHECKING:
    from qvsplit.pipeline.execution import Execution, Target
    from qvsplit.store.lock import Lock


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
    call = Call(paths, storage, options, callbacks, current_cures(options), began, time.time(), {})
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks on odd metadata; sizes have our own limit

        def locked() -> Lock:
            return stack.enter_context(storage.lock(wait=options.wait, on_note=callbacks.on_note))

        exists = (storage.folder / layout.LOCK).exists()
        lock = locked() if exists and not options.dry_run else None  # before the store is read
        view = look(call, lock)
        summary = _nothing_to_do(call, view)
        if summary is not None:
            return summary
        if lock is None and not options.dry_run:  # a new store: created now that there is something for it
            lock = locked()
        return _go(call, view, lock)


def _nothing_to_do(call: Call, view: View) -> Summary | None:
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


def _go(call: Call, view: View, lock: Lock | None) -> Summary:
    """Find out from the store what is to be done, and do it. Without a lock it is only said."""
    if lock is not None and view.repaired is None:
        view = _repaired(call, view, lock)
    store = view.store or read_unlocked(call)
    if store.config is not None and not call.options.rebuild:
        check_against(call.options, store.config, call.storage.location)
    planned = _planned(call, view, store)
    if call.options.rebuild and lock is not None:
        return _rebuild(call, view, store, planned, lock)
    from qvsplit.pipeline.devices import check_model
    from qvsplit.pipeline.execution import Target

    check_model(call.options, store.config, store.provenance)  # all that is to be read may turn out to be known
    summary = _summary_of(planned, view.repaired or 0)
    if lock is None:
        from qvsplit.pipeline.preview import preview

        summary.preview = preview(planned.to_read, store, call.storage, call.options)
        return _finished(call, summary)
    call.callbacks.on_plan(len(planned.to_read))
    generation = _claimed(call, planned, store.generation)
    target = Target(call.storage, store, lock, generation, cures=call.cures, fetch=view.source.fetch)
    execution = _execute(call, planned, summary, target)
    _write_caches(call, view, planned, execution)
    return _noted(call, summary)


def _repaired(call: Call, view: View, lock: Lock) -> View:
    """Take up the store as it is on disk now that it is locked; list again where the listing hung on what has gone."""
    store, repaired = opened(call, lock)
    roots_changed = view.store is not None and view.store.roots != store.roots
    if (view.index is not None and repaired) or roots_changed:
        return listed(call, None, store, repaired)
    return replace(view, store=store, repaired=repaired)


def _planned(call: Call, view: View, store: Store) -> Plan:
    """Hold the listings against the store, and look for what no listing has."""
    options = PlanOptions(call.options.retry_failed, call.options.checksum, call.cures)
    scope = view.source.scope
    for start in scope.empty:
        number = sum(
            row.status != "deleted" and is_within(file_on_disk(row.root, row.path), start) for row in store.rows
        )
        if number:
            call.callbacks.on_note(no_items_any_more(start, number))
    planned = plan(view.listings, scope, store, view.tallies, options)
    presence = view.source.stat([row.key for row in planned.unseen])
    return settle(planned, presence, view.listings, store, options)


def _summary_of(planned: Plan, repaired: int) -> Summary:
    return Summary(
        found=planned.found, unchanged=planned.unchanged, failed_before=planned.failed_before,
        to_read=len(planned.to_read), not_found=len(planned.absent), repaired=repaired,
    )  # fmt: skip


def _claimed(call: Call, planned: Plan, highest: int) -> int:
    """Claim a generation above `highest`, where there is something to write; else give 0."""
    deletes = call.options.prune and any(row.key not in planned.empty_folders for row in planned.absent)
    return claim_generation(call.storage, highest) if planned.to_read or deletes else 0


def _execute(call: Call, planned: Plan, summary: Summary, target: Target) -> Execution:
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


def _noted(call: Call, summary: Summary) -> Summary:
    """Finish the summary, and note it in the history if there is something to say."""
    summary = _finished(call, summary)
    if summary.did_anything:
        history.add_run(call.storage, call.clock, summary.to_json())
    return summary


def _finished(call: Call, summary: Summary) -> Summary:
    summary.store = call.storage.location
    summary.stages = {name: round(seconds, 3) for name, seconds in (call.seconds | summary.stages).items()}
    summary.seconds = round(time.perf_counter() - call.began, 3)
    summary.peak_memory_bytes = peak_memory()
    return summary


def _write_caches(call: Call, view: View, planned: Plan, execution: Execution) -> None:
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


def _rebuild(call: Call, view: View, old: Store, found: Plan, lock: Lock) -> Summary:
    """Make the store again, beside the old one, which it replaces once it is whole."""
    from qvsplit.pipeline.execution import Target

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
    generation = _claimed(call, planned, max(store.generation, old.generation))
    first = next_number(call.storage)
    target = Target(new, store, lock, generation, first, call.cures, view.source.fetch)
    execution = _execute(call, planned, summary, target)
    if not shards_in(new):
        raise UsageError("no image was left to rebuild from; the store is as it was")
    if not summary.remaining:
        with held_back():
            rebuild.put_in_place(call.storage)
        _write_caches(call, view, planned, execution)
    return _noted(call, summary)


def _refuse_loss(call: Call, view: View, old: Store, found: Plan) -> None:
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


def _staged(call: Call, new: Storage) -> Store:
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
