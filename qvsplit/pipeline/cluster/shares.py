"""How the CPUs and GPUs of a cluster are shared out among readers and encoders."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from qvsplit.errors import UsageError
from qvsplit.pipeline.cluster.connection import Cluster


@dataclass(frozen=True)
class Shares:
    """What of a node each worker takes, as Ray counts it."""

    reader_cpus: float
    encoder_cpus: float
    encoder_gpus: float
    encoder_threads: int


def shares_of(cluster: Cluster, encoders: int, *, gpus: bool) -> Shares:
    """Share the CPUs out: on a GPU an encoder needs none; without, all encoders have one half, and readers the other.

    An encoder's threads are as many as its node has CPUs for it: reading leaves most of its half idle.
    """
    reader = min(1.0, cluster.most_cpus / 2)
    if gpus:
        return Shares(reader, 0.0, 1.0, 1)
    share = min(cluster.cpus / encoders, cluster.most_cpus) / 2
    share = math.floor(share) if share >= 1 else max(math.floor(share * 10_000), 1) / 10_000  # as Ray counts them
    return Shares(reader, share, 0.0, max(1, int(cluster.most_cpus / math.ceil(encoders / cluster.nodes))))


def device_of(asked: str | None, cluster: Cluster) -> str:
    """Give the device that an encoder has in its own process. UsageError for one that Ray does not share out."""
    if asked is None:
        return "cuda" if cluster.gpus else "cpu"
    if re.fullmatch(r"cuda:\d+|.*,.*", asked):
        raise UsageError(f"`device` {asked}: on a cluster Ray chooses which; give cpu or cuda, and `ray_encoders`")
    if asked == "cuda" and not cluster.gpus:
        raise UsageError("`device` cuda: the Ray cluster has no GPU; try `device=cpu`")
    return asked
