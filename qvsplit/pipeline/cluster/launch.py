"""Begin a run on a cluster: start the process that joins it, and hold its first encoder against the store."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from qvsplit.checkpoints.opening import default_model
from qvsplit.pipeline.cluster import messages
from qvsplit.pipeline.cluster.runner import ClusterRunner, Commits, DriverProcess
from qvsplit.pipeline.devices import StoreDeclares
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.pipeline.runner import RunnerOptions
from qvsplit.pipeline.summary import ExtractCallbacks
from qvsplit.runtime import interrupts
from qvsplit.runtime.clock import active_seconds
from qvsplit.runtime.interrupts import held_back
from qvsplit.runtime.loading import CLUSTER, READY
from qvsplit.store.staging import Staging


def launch(
    options: ExtractOptions,
    bounds: RunnerOptions,
    own: StoreDeclares,
    staging: Staging,
    generation: int,
    commits: Callable[[messages.Declared], Commits],
    callbacks: ExtractCallbacks,
) -> ClusterRunner:
    """Have a process join the cluster; give the runner of what it declares.

    Args:
        options: Of the extraction; `ray` names the cluster.
        bounds: Of reading.
        own: What the store declares.
        staging: Where shards are written; its folder is made.
        generation: Of every row.
        commits: Given what the first encoder declares, how shards are committed.
        callbacks: Who hears of it.

    Raises:
        UsageError: There is no such cluster, or it has no GPU where one is asked for.
        ModelError, ConfigError: As in a run on one machine.
        ProcessError: No cluster can be started here, or its process ended.
    """
    callbacks.on_load(CLUSTER, 0, 0)
    left = None if bounds.deadline is None else bounds.deadline - active_seconds()
    model = default_model() if options.model is None and own.provenance is None else options.model
    options = replace(options, model=_absolute(model), adapter=_absolute(options.adapter))
    driver = DriverProcess()
    try:
        bounds = replace(bounds, scratch=staging.folder)  # absolute, and gone with the run
        driver.send(messages.Begin(options, bounds, own, generation, staging, left))
        declared = None
        while declared is None:
            interrupts.check()
            declared = driver.receive()
        assert isinstance(declared, messages.Declared)
        for note in declared.notes:
            callbacks.on_note(note)
        callbacks.on_load(READY, 0, 0)
        staging.create()
        return ClusterRunner(driver, staging, commits(declared), bounds.limit, callbacks.on_note)
    except BaseException:
        with held_back():
            driver.end(at_once=True)
        raise


def _absolute(place: str | None) -> str | None:
    """Give a folder as every node has it, wherever its processes were started; a hub name as it is."""
    return os.path.abspath(place) if place is not None and os.path.isdir(place) else place
