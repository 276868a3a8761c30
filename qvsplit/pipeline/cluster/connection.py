"""Join a Ray cluster, or start one on this machine, quietly; and what it has."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from qvsplit.errors import ProcessError, UsageError
from qvsplit.pipeline.options import LOCAL_RAY
from qvsplit.runtime.interrupts import Terminated
from qvsplit.runtime.streams import stderr_silenced

# 127.0.0.1 is replaced by Ray with an address that other machines reach; this one stays on this machine. Linux has all
# of 127.0.0.0/8, other systems the first address alone.
LOOPBACK = "127.0.0.2" if sys.platform == "linux" else None
# Nobody who extracts images has asked to report that; what goes wrong is raised, and need not be printed as well.
# A head that does not answer would have Ray end the process after a minute, with exit code 1 and without a word; and a
# thread that still asks something of Ray when the run has ended would join whatever cluster there is.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    "RAY_ENABLE_AUTO_CONNECT": "0",
}
CONNECT_SECONDS = 10.0
ASK_SECONDS = 5.0
LOST_SECONDS = 30.0


@dataclass(frozen=True)
class Cluster:
    """What a cluster has: the sums over its nodes, and what the largest has."""

    nodes: int
    cpus: float
    gpus: float
    most_cpus: float  # of one node
    object_store_bytes: int  # of the smallest


@contextmanager
def connected(address: str) -> Iterator[Cluster]:
    """Join the cluster at `address`, or start one, for the block; a process that has joined one already stays there.

    Args:
        address: `local` starts a cluster of this machine alone, which ends with the block; `auto` joins the one that
            this machine belongs to; else HOST:PORT of a cluster's head.

    Raises:
        UsageError: There is no such cluster.
        ProcessError: None can be started here.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)  # before Ray is imported
    import ray

    global _head
    _head = _Head()
    if ray.is_initialized():
        yield _cluster()
        return
    folder = tempfile.mkdtemp(prefix="qvsplit-ray-") if address == LOCAL_RAY else None
    try:
        with _own_signals(), stderr_silenced():  # on which Ray says how much it is going to say
            _join(address, folder)
        _quiet()
        yield _cluster()
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _join(address: str, folder: str | None) -> None:
    import ray

    _check_head(address)
    words: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    host = address.rpartition(":")[0]
    if address == LOCAL_RAY:
        words |= {"include_dashboard": False, "_temp_dir": folder, "_node_ip_address": LOOPBACK}
    elif host.startswith("127."):
        words |= {"_node_ip_address": host}  # the cluster is on this machine, and stays there
    try:
        ray.init(address=address, **words)
    except (ConnectionError, ValueError) as error:
        raise UsageError(f"`ray` {address}: there is no such cluster ({_first_line(error)}); {_ADVICE}") from None
    except SystemExit:  # by the handler that Ray sets, until it has begun
        raise Terminated from None
    except (RuntimeError, OSError) as error:
        raise ProcessError(f"`ray` {address}: Ray does not start ({_first_line(error)})") from None


def _check_head(address: str) -> None:
    """UsageError where nobody listens at an address: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UsageError(f"`ray` {address}: there is no such cluster ({error}); {_ADVICE}") from None


_ADVICE = "start one with `ray start --head`, or use `ray=local`"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _quiet() -> None:
    """Let Ray Data, which has a logger of its own, say nothing on the terminal."""
    import ray.data  # noqa: F401 - configures it

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handler of SIGTERM, which Ray replaces by one that ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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


class _Head:
    """Whether the cluster's head answers. Ray itself ends the process, silently, some time after it does not."""

    def __init__(self) -> None:
        self._asked = self._answered = time.monotonic()

    def check(self) -> None:
        """Ask, now and then. Raises ProcessError once there has been no answer for `LOST_SECONDS`."""
        import ray

        now = time.monotonic()
        if now - self._asked < ASK_SECONDS:
            return
        self._asked = now
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=ASK_SECONDS).close()
        except OSError as error:
            if time.monotonic() - self._answered > LOST_SECONDS:
                raise ProcessError(
                    f"the head of the Ray cluster, {host}:{port}, no longer answers ({error}); what was finished is "
                    "kept: run again once it does"
                ) from None
        else:
            self._answered = time.monotonic()


_head = _Head()


def check_alive() -> None:
    """ProcessError where the cluster's head has not answered for long."""
    _head.check()


def value_of(task: Any) -> Any:
    """Wait for a task, and give its value.

    Raises:
        ProcessError: Its process or node died too often, or the cluster is gone.
    """
    import ray

    while True:
        check_alive()
        done, _ = ray.wait([task], timeout=ASK_SECONDS)
        if done:
            break
    try:
        return ray.get(task)
    except Exception as error:
        raise_ours(error)


def raise_ours(error: BaseException) -> NoReturn:
    """Raise what a user can be told of an error of Ray's; an error of our own code, or of Ray Data's, as it is."""
    from ray.exceptions import RayError, RayTaskError

    if isinstance(error, RayTaskError) or not isinstance(error, RayError):
        raise error
    raise ProcessError(
        f"the Ray cluster lost what the run depends on ({_first_line(error)}); what was finished is kept: run again"
    ) from None
