"""Join a Ray cluster, or start one on this machine; what it has; and its errors, for people. In the driver process."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qvsplit.errors import ProcessError, UsageError
from qvsplit.pipeline.options import LOCAL_RAY

# By which the processes of a cluster on this machine find each other; they listen on all addresses nevertheless, and it
# is Ray's token that keeps others out. Ray replaces 127.0.0.1 by an address that other machines reach. Linux has all of
# 127.0.0.0/8, other systems the first address alone.
LOOPBACK = "127.0.0.2" if sys.platform == "linux" else None
# Nobody who extracts images has asked to report that. A head that does not answer has Ray end the process after so many
# seconds. A thread that still asks something of Ray when the run has ended would join whatever cluster there is.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "30",
    "RAY_ENABLE_AUTO_CONNECT": "0",
}
CONNECT_SECONDS = 10.0
_ADVICE = "have `ray start` make this machine a head, or use `ray=local`"


@dataclass(frozen=True)
class Cluster:
    """What a cluster has: the sums over its nodes, and what the largest has."""

    nodes: int
    cpus: float
    gpus: float
    most_cpus: float  # of one node
    object_store_bytes: int  # of the smallest


@contextmanager
def connected(address: str, folder: str) -> Iterator[Cluster]:
    """Join the cluster at `address`, or start one, for the block.

    Args:
        address: `local` starts a cluster of this machine alone, which ends with the block; `auto` joins the one that
            this machine belongs to; else HOST:PORT of a cluster's head.
        folder: For what a cluster that is started here writes: logs, sockets.

    Raises:
        UsageError: There is no such cluster, or it can compute nothing.
        ProcessError: None can be started here.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)  # before Ray is imported
    words: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    host = address.rpartition(":")[0]
    if address == LOCAL_RAY:
        words |= {"include_dashboard": False, "_temp_dir": folder, "_node_ip_address": LOOPBACK}
    elif host:
        _check_head(address)
        if host.startswith("127."):
            words |= {"_node_ip_address": host}  # the cluster is on this machine
    import ray

    try:
        try:
            ray.init(address=address, **words)
        except (ConnectionError, ValueError) as error:
            raise UsageError(f"`ray` {address}: there is no such cluster ({_gist(error)}); {_ADVICE}") from None
        except (RuntimeError, OSError) as error:
            raise ProcessError(f"`ray` {address}: Ray does not start ({_gist(error)})") from None
        yield _cluster()
    finally:
        ray.shutdown()


def _check_head(address: str) -> None:
    """UsageError where nobody listens at an address: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise UsageError(f"`ray` {address}: there is no such cluster ({error}); {_ADVICE}") from None


def _gist(error: BaseException) -> str:
    """Give the first line of what Ray says."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _cluster() -> Cluster:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [node.get("CPU", 0.0) for node in nodes]
    stores = [int(node["object_store_memory"]) for node in nodes if node.get("object_store_memory")]
    if not any(cpus):
        raise UsageError("the Ray cluster has no CPUs for tasks; start its nodes with some, or use `ray=local`")
    return Cluster(
        sum(1 for one in cpus if one), sum(cpus), sum(node.get("GPU", 0.0) for node in nodes), max(cpus),
        min(stores, default=1 << 30),
    )  # fmt: skip


def value_of(task: Any) -> Any:
    """Wait for a task, and give its value. Raises ProcessError where its process or node died too often."""
    import ray

    try:
        return ray.get(task)
    except Exception as error:
        raise as_ours(error) from None


def as_ours(error: BaseException) -> BaseException:
    """Give what a user can be told of an error of Ray's; an error of our own code, or of Ray Data's, as it is."""
    from ray.exceptions import RayError, RayTaskError

    lost = error.cause if isinstance(error, RayTaskError) else error  # a task may have lost what it depends on
    if not isinstance(lost, RayError) or isinstance(lost, RayTaskError):
        return error
    error = lost
    return ProcessError(
        f"the Ray cluster lost what the run depends on ({_gist(error)}); what was finished is kept: run again"
    )
