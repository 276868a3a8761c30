"""Begin a run on a cluster: join it, load the first encoder there, and hold it against the store."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from qvsplit.errors import QvsplitError, UsageError
from qvsplit.pipeline.cluster.connection import Cluster, connected, value_of
from qvsplit.pipeline.cluster.job import Declared, Job
from qvsplit.pipeline.cluster.runner import ClusterRunner, Commits, shares_of
from qvsplit.pipeline.cluster.stages import declare
from qvsplit.pipeline.devices import StoreDeclares
from qvsplit.pipeline.options import ExtractOptions, encoders_of
from qvsplit.pipeline.runner import RunnerOptions
from qvsplit.runtime.clock import active_seconds
from qvsplit.runtime.loading import CLUSTER, READY, TENSORS
from qvsplit.store.staging import Staging

if TYPE_CHECKING:
    from qvsplit.pipeline.summary import ExtractCallbacks


def launch(
    stack: ExitStack,
    options: ExtractOptions,
    bounds: RunnerOptions,
    own: StoreDeclares,
    staging: Staging,
    generation: int,
    commits: Callable[[Declared], Commits],
    callbacks: ExtractCallbacks,
) -> ClusterRunner:
    """Join the cluster until `stack` ends; give its runner.

    Args:
        stack: Ends the connection.
        options: Of the extraction; `ray` names the cluster.
        bounds: Of reading.
        own: What the store declares.
        staging: Where shards are written.
        generation: Of every row.
        commits: Given what the first encoder declares, how shards are committed.
        callbacks: Who hears of it.

    Raises:
        UsageError: There is no such cluster, or it has no GPU where one is asked for.
        ModelError, ConfigError: As in a run on one machine.
    """
    assert options.ray is not None
    callbacks.on_load(CLUSTER, 0, 0)
    cluster = stack.enter_context(connected(options.ray))
    device = _device(options.device, cluster)
    encoders = encoders_of(options) or (1, max(1, int(cluster.gpus) if device == "cuda" else cluster.nodes))
    options = replace(
        options, ray=None, ray_encoders=None, device=device, model=_absolute(options.model),
        adapter=_absolute(options.adapter),
    )  # fmt: skip
    shares = shares_of(cluster, encoders[1], gpus=device == "cuda")
    callbacks.on_load(TENSORS, 0, 0)
    declared = _declared(options, own, shares.encoder_cpus, shares.encoder_gpus)
    for note in declared.notes:
        callbacks.on_note(note)
    callbacks.on_load(READY, 0, 0)
    own = StoreDeclares(own.where, own.config or declared.schema.config, declared.schema.tensors, declared.provenance)
    staging.create()
    left = None if bounds.deadline is None else bounds.deadline - active_seconds()
    ends_at = None if left is None else time.time() + left
    job = Job(options, bounds, own, generation, staging, shares.encoder_threads, ends_at)
    return ClusterRunner(job, declared.schema, cluster, commits(declared), encoders)


def _device(asked: str | None, cluster: Cluster) -> str:
    """Give the device that an encoder has in its own process. UsageError for one that Ray does not share out."""
    if asked is None:
        return "cuda" if cluster.gpus else "cpu"
    if re.fullmatch(r"cuda:\d+|.*,.*", asked):
        raise UsageError(f"`device` {asked}: on a cluster Ray chooses which; give cpu or cuda, and `ray_encoders`")
    if asked == "cuda" and not cluster.gpus:
        raise UsageError("`device` cuda: the Ray cluster has no GPU; try `device=cpu`")
    return asked


def _absolute(place: str | None) -> str | None:
    """Give a folder as every node has it, wherever its processes were started; a hub name as it is."""
    return os.path.abspath(place) if place is not None and os.path.isdir(place) else place


def _declared(options: ExtractOptions, own: StoreDeclares, cpus: float, gpus: float) -> Declared:
    """Load an encoder there. Its process has the libraries then, and may become one of the workers."""
    import ray

    task = ray.remote(num_cpus=cpus, num_gpus=gpus)(declare)
    declared: Declared | QvsplitError = value_of(task.remote(options, own))
    if isinstance(declared, QvsplitError):
        raise declared
    return declared
