"""extract_files: bring a store up to date with the images and videos under some paths.

Wires source, plan, runner, encoder and store together: list → plan → run the stages → write rows. Only shards that the
store's catalogue does not know are opened; the encoder is loaded when the first item needs it, and not before.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvsplit.errors import ConfigError, QvsplitError, StoreDamaged, UsageError, some_of
from qvsplit.pipeline.options import ExtractOptions, check_against, check_options, like
from qvsplit.pipeline.plan import Plan, PlanOptions, nothing_to_do, plan, settle, tallies_after
from qvsplit.pipeline.summary import ExtractCallbacks, Progress, Summary, with_progress
from qvsplit.pipeline.view import Call, View, current_cures, listed, look, no_items_any_more, opened, rows_below
from qvsplit.runtime import arguments
from qvsplit.runtime.atomic_files import disk_errors
from qvsplit.runtime.interrupts import held_back
from qvsplit.runtime.memory import peak_memory
from qvsplit.sources.source import LeftOut
from qvsplit.store import history, layout, rebuild
from qvsplit.store.catalogue_file import Noted, catalogue_of
from qvsplit.store.generation import claim_generation
from qvsplit.store.opening import read_store, store_of
from qvsplit.store.shards import next_number, shard_files, shards_in
from qvsplit.store.storage import LocalStorage, Storage
from qvsplit.store.store import Store
from qvsplit.store.walked import Walk, note_walk

if TYPE_CHECKING:
    from qvsplit.pipeline.execution import Execution, Target
    from qvsplit.store.lock import Lock


def extract_files(
    paths: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    out: str | PathLike[str] = "embeds",
    options: ExtractOptions | None = None,
    callbacks: ExtractCallbacks | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Bring the store `out` up to date with the files under `paths`.

        qvsplit.extract_files("photos")
        qvsplit.extract_files(["photos", "scan.tif"], out="embeds", options=qvsplit.ExtractOptions(prune=True))

    Whatever ends it, finished rows are kept; `callbacks.on_end` hears what was done, also where an exception ends it.

    Args:
        paths: A path, or several: folders, which are walked, and files.
        out: The store: a folder of shards, created if need be.
        options: See `ExtractOptions`.
        callbacks: Who hears of what goes on.
        on_progress: Hears after each item how far the run is.

    Raises:
        QvsplitError: The run cannot go on.
    """
    began = time.perf_counter()
    options = ExtractOptions() if options is None else options
    callbacks = ExtractCallbacks() if callbacks is None else callbacks
    places = _checked(paths, out, options, callbacks)
    if on_progress is not None:
        callbacks = with_progress(callbacks, on_progress)
    storage = LocalStorage(Path(out))
    call = Call(places, storage, options, callbacks, current_cures(options), began, time.time(), {}, ExitStack())
    summary = _extract(call)
    callbacks.on_end(summary)
    return summary


def _checked(
    paths: str | PathLike[str] | Sequence[str | PathLike[str]],
    out: str | PathLike[str],
    options: ExtractOptions,
    callbacks: ExtractCallbacks,
) -> list[str]:
    """Give the paths as a list. UsageError that names the argument for what cannot be."""
    places = arguments.paths("paths", paths)
    store = arguments.a_path("out", out, "the folder of a store")
    check_options(arguments.instance_of("options", options, ExtractOptions, "ExtractOptions"))
    arguments.instance_of("callbacks", callbacks, ExtractCallbacks, "ExtractCallbacks")
    if any(os.path.realpath(store) == os.path.realpath(path) for path in places):
        raise UsageError(f"{store} is itself the folder of images and videos; give another store, it may be inside")
    return places


def _extract(call: Call) -> Summary:
    storage, options = call.storage, call.options
    with warnings.catch_warnings(), call.stack as stack:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks on odd metadata; sizes have our own limit

        def locked() -> Lock:
            return stack.enter_context(storage.lock(wait=options.wait, on_note=call.callbacks.on_note))

        with disk_errors(storage.location):
            exists = any(file.name == layout.LOCK.rpartition("/")[2] for file in storage.list(layout.OWN_FOLDER))
        lock = locked() if exists and not options.dry_run else None  # before the store is read
        view = look(call, lock)
        summary = _nothing_to_do(call, view)
        if summary is not None:
            if lock is not None:  # how the folders are walked may be new, or no longer known
                _note_walk(call, view)
            return summary
        if lock is None and not options.dry_run:  # a new store: created now that there is something for it
            lock = locked()
        return _go(call, view, lock)


def _nothing_to_do(call: Call, view: View) -> Summary | None:
    """Give the summary, if the catalogue alone shows that there is nothing to do."""
    if not view.tallies or view.store.config is None or view.store.provenance is None:
        return None
    unsettled = view.store.catalogue.unsettled
    total = nothing_to_do(view.tallies, unsettled, view.listings, view.source.scope, prune=call.options.prune)
    if total is None:
        return None
    check_against(call.options, view.store.config, call.storage.location)
    if call.options.model is not None or call.options.adapter is not None:
        from qvsplit.pipeline.devices import check_model

        check_model(call.options, view.store.config, view.store.provenance)
    call.callbacks.on_plan(0)
    found = sum(listing.number for listing in view.listings)
    summary = Summary(
        found=found, unchanged=total.ok, failed_before=total.failed, not_found=total.not_found, excluded=total.excluded,
        **_left_out(view.source.scope.left_out),
    )  # fmt: skip
    return _finished(call, summary)


def _left_out(left_out: LeftOut) -> dict[str, Any]:
    """Give what a walk has left out as a summary has it."""
    return {"left_out": dict(left_out.kinds), "excluded_files": left_out.files, "excluded_folders": left_out.folders}


# ------------------------------------------------------------------------------------------------------------ doing


def _go(call: Call, view: View, lock: Lock | None) -> Summary:
    """Find out from the store what is to be done, and do it. Without a lock it is only said."""
    if lock is not None and view.repaired is None:
        view = _repaired(call, view, lock)
    store = view.store
    if store.config is not None and not call.options.rebuild:
        check_against(call.options, store.config, call.storage.location)
    planned = _planned(call, view, store)
    if call.options.rebuild and lock is not None:
        return _rebuild(call, view, store, planned, lock)
    from qvsplit.pipeline.devices import check_model
    from qvsplit.pipeline.execution import Target

    check_model(call.options, store.config, store.provenance)  # all that is to be read may turn out to be known
    summary = _summary_of(planned, view, view.repaired or 0)
    if lock is None:
        from qvsplit.pipeline.preview import preview

        summary.preview = preview(planned.to_read, store, call.storage, call.options, call.callbacks.on_note)
        return _finished(call, summary)
    _note_walk(call, view)
    call.callbacks.on_plan(len(planned.to_read))
    generation = _claimed(call, planned, store.generation)
    target = Target(call.storage, store, lock, generation, cures=call.cures, fetch=view.source.fetch)
    execution = _execute(call, planned, summary, target)
    _note_state(call, view, planned, execution)
    return _noted(call, summary)


def _repaired(call: Call, view: View, lock: Lock) -> View:
    """Take up the store as it is on disk now that it is locked; list again where the listing hung on what has gone."""
    store, repaired = opened(call, lock)
    if repaired or view.store.roots != store.roots or view.tallies != store.catalogue.tallies:
        return listed(call, store, repaired)
    return replace(view, store=store, repaired=repaired)


def _note_walk(call: Call, view: View) -> None:
    """Note which folders belong to the store, before anything of them is read: a run may be killed."""
    folders = dict.fromkeys(start for start in view.source.scope.starts if os.path.isdir(start))
    if folders or view.store.config is None:  # of a store of single files it is known that it has none
        note_walk(call.storage, Walk(tuple(folders), tuple(call.options.exclude), call.options.videos))


def _planned(call: Call, view: View, store: Store) -> Plan:
    """Hold the listings against the store, and look for what no listing has."""
    options = PlanOptions(call.options.retry_failed, call.options.checksum, call.cures)
    scope = view.source.scope
    for start in scope.empty:
        if number := rows_below(store, start):
            call.callbacks.on_note(no_items_any_more(start, number))
    planned = plan(view.listings, scope, store, view.tallies, options)
    presence = view.source.stat([row.key for row in planned.unseen])
    return settle(planned, presence, view.listings, store, options)


def _summary_of(planned: Plan, view: View, repaired: int) -> Summary:
    return Summary(
        found=planned.found, unchanged=planned.unchanged, failed_before=planned.failed_before,
        to_read=len(planned.to_read), not_found=len(planned.absent), repaired=repaired,
        excluded=len(planned.excluded), **_left_out(view.source.scope.left_out),
    )  # fmt: skip


def _claimed(call: Call, planned: Plan, highest: int) -> int:
    """Claim a generation above `highest`, where there is something to write; else give 0."""
    deletes = call.options.prune and any(row.key not in planned.empty_folders for row in planned.absent)
    return claim_generation(call.storage, highest) if planned.to_read or deletes else 0


def _execute(call: Call, planned: Plan, summary: Summary, target: Target) -> Execution:
    """Carry out the plan; whatever ends it, the summary so far is reported, and goes into the history."""
    from qvsplit.pipeline.execution import Execution

    execution = Execution(planned, target, call.options, summary, call.callbacks)
    try:
        execution.run()
    except (KeyboardInterrupt, QvsplitError) as error:
        summary.interrupted = isinstance(error, KeyboardInterrupt)
        ended = {} if summary.interrupted else {"error": type(error).__name__}
        history.add_run(call.storage, call.clock, _finished(call, summary).to_json() | ended)
        call.callbacks.on_end(summary)
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


def _note_state(call: Call, view: View, planned: Plan, execution: Execution) -> None:
    """Leave what the next run needs to know to have nothing to do, if anything in it has changed."""
    recorder = execution.recorder
    if execution.schema is None:
        return
    before = view.store.catalogue
    touched = {row.folder for row in recorder.written.values()}
    tallies = tallies_after(
        planned, view.listings, view.source.scope, view.tallies, recorder.current, recorder.holds, touched
    )
    cures = call.cures.to_json()
    if tallies == before.tallies and cures == before.cures and not recorder.written:
        return
    with disk_errors(call.storage.location):
        files = shard_files(call.storage)
    catalogue_of(call.storage, files, noted=Noted(tallies, cures), on_shard=call.callbacks.on_shard).close()


# ---------------------------------------------------------------------------------------------------------- rebuild


def _rebuild(call: Call, view: View, old: Store, found: Plan, lock: Lock) -> Summary:
    """Make the store again, beside the old one, which it replaces once it is whole."""
    from qvsplit.pipeline.execution import Target

    if old.config is None or old.provenance is None:
        raise UsageError(f"{call.storage.location} has no shards yet: there is nothing to rebuild; leave `rebuild` out")
    _refuse_loss(call, view, old, found)
    call = replace(call, options=like(old.config, old.provenance, call.options))
    lock.announce()
    _note_walk(call, view)
    new = rebuild.begin(call.storage)
    store = _staged(call, new)
    view = replace(view, store=store, tallies={})
    planned = plan(view.listings, view.source.scope, store, {}, PlanOptions(call.options.retry_failed))
    summary = _summary_of(planned, view, 0)
    summary.not_found = summary.excluded = 0
    call.callbacks.on_plan(len(planned.to_read))
    generation = _claimed(call, planned, max(store.generation, old.generation))
    first = next_number(call.storage)
    target = Target(new, store, lock, generation, first, call.cures, view.source.fetch)
    execution = _execute(call, planned, summary, target)
    if not shards_in(new):
        raise UsageError("no item was left to rebuild from; the store is as it was")
    if not summary.remaining:
        with held_back():
            rebuild.put_in_place(call.storage)
        _note_state(call, view, planned, execution)
    return _noted(call, summary)


def _refuse_loss(call: Call, view: View, old: Store, found: Plan) -> None:
    """UsageError where a rebuild would drop an item of which nobody has said that it may go."""
    outside = rebuild.roots_left_out(old.rows, view.source.scope.starts)
    if outside:
        raise UsageError(
            f"{call.storage.location} also holds items in {some_of(outside)}, which `rebuild=True` would lose; give "
            "that path too, or take them out with `qvsplit purge`"
        )
    seen = {entry.key for listing in view.listings for entry in listing.entries()}
    seen |= {entry.key for entry in found.to_read}
    if call.options.prune:
        seen |= {row.key for row in found.absent if row.key not in found.empty_folders}
    excluded = {row.key for row in found.excluded}
    left_out = [path for _, path in dict.fromkeys(row.key for row in old if row.key in excluded)]
    if left_out:
        raise UsageError(
            f"{len(left_out):,} items of the store are excluded now ({some_of(left_out, 3)}), and `rebuild=True` would "
            "drop them; exclude them no longer, or take them out with `qvsplit purge`"
        )
    lost = [path for _, path in dict.fromkeys(row.key for row in old if row.key not in seen)]
    if lost:
        raise UsageError(
            f"{len(lost):,} items of the store cannot be found now ({some_of(lost, 3)}), and `rebuild=True` would "
            "drop them; mount what is not mounted, or give `prune=True` to drop what was deleted"
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
        return store_of([])
    return store
