"""A Ray cluster of several nodes on this machine, light and on loopback, whose parts can be killed.

A server process starts the nodes; the process that asks for them imports nothing of Ray and is no driver. A driver is a
process of its own that has `RayCluster.environment` and joins at `RayCluster.address`: it is attached to the head, node
0, which is never killed.

    with RayCluster(3) as cluster:
        process = start_process("extract", ..., "--ray", cluster.address, env=cluster.environment)
        cluster.kill(cluster.workers("ReadItems")[0].pid)
        cluster.kill_node(1)
        cluster.start_node(1)

    python -m tests.support.ray_cluster        serves: one JSON object a line in, one out

The driver must not be told another address of the node than the head's (`_node_ip_address` of `ray.init` may be 127.0.0.2,
or left out). Nodes die with the server, and workers with their node. What is still there of the server's session at the end is
killed, so that nothing is left, be it after an exception.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ADDRESS = "127.0.0.2"  # Ray replaces localhost and 127.0.0.1 by the machine's own address
MEGABYTE = 1_000_000
END_SECONDS = 20.0
LIST_SECONDS = 0.1  # for which a list of processes is used again

# Nodes, their workers and the driver need each of these.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a warning about GPUs
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_enable_metrics_collection": "0",
    "RAY_enable_open_telemetry": "0",
    "RAY_enable_worker_prestart": "0",  # a worker is started when there is work for it
    "RAY_prestart_worker_first_driver": "0",
    "RAY_verbose_spill_logs": "1",  # says from the first byte on what was moved to the disk
    "RAY_num_workers_soft_limit": "16",  # else of one a CPU: idle ones are ended, and others started a second later
    "RAY_memory_monitor_refresh_ms": "0",  # it would kill workers while others fill the memory
    # A dead node refuses the connection, which fails at once; a live one that is busy has all the time of the timeout.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "20000",
    "RAY_health_check_failure_threshold": "3",
    "OMP_NUM_THREADS": "1",  # Ray sets it from the CPUs that a task asks for where it is not set
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Worker:
    """A worker process of a node.

    Attributes:
        pid: Its process id.
        node: The number of its node.
        title: What Ray calls it: `ray::MapWorker(MapBatches(ReadItems))`, say, or `ray::IDLE`.
    """

    pid: int
    node: int
    title: str


@dataclass(frozen=True)
class ObjectStore:
    """What the object store of a node holds, in bytes.

    Attributes:
        node: The node's number.
        used: What its objects take now, as the node says some ten times a second.
        capacity: What they may take in shared memory.
        touched: Shared memory that was ever written to: no more was used at any moment, also between two looks.
        spilled: What lies on the disk now, as it was moved there to make room.
        spilled_in_all: What was ever moved to the disk, as its log says, in whole MiB.
    """

    node: int
    used: int
    capacity: int
    touched: int
    spilled: int
    spilled_in_all: int


class RayCluster:
    """Nodes of a Ray cluster. Use as a context manager.

    Attributes:
        address: HOST:PORT that a driver joins.
        environment: What a driver's process must have as its environment.
        raylets: The process of each node, by the node's number; those that were killed are left out.
        start_seconds: What it took to start them.
    """

    def __init__(
        self,
        nodes: int = 3,
        *,
        cpus: int = 1,
        object_store_bytes: int = 100 * MEGABYTE,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Take how many nodes, and what each has.

        Args:
            nodes: How many, the head among them.
            cpus: Of each: as many tasks and actors that ask for a CPU fit on a node, whatever the machine has.
            object_store_bytes: Of each; Ray takes no less than 75 MiB.
            environment: More variables for nodes, workers and drivers.
        """
        self._nodes, self._cpus, self._object_store_bytes = nodes, cpus, object_store_bytes
        self._more = environment or {}
        self.raylets: dict[int, int] = {}
        self._children: dict[int, list[int]] = {}
        self._children_until = 0.0

    def __enter__(self) -> RayCluster:
        began = time.monotonic()
        # Unix sockets lie below it: their paths end at 107 bytes, so that pytest's folders are too deep.
        self.temporary = Path(tempfile.mkdtemp(prefix="qvsplit-nodes-", dir="/tmp"))
        self.environment = os.environ | _ENVIRONMENT | {"RAY_TMPDIR": str(self.temporary)} | self._more
        for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
            self.environment.pop(name, None)
        self._log = (self.temporary / "server.log").open("w+")
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.ray_cluster"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=self.environment,
            cwd=Path(__file__).parents[2],
            start_new_session=True,  # by which all that belongs to the cluster is known
        )
        try:
            for number in range(self._nodes):
                self.start_node(number)
        except BaseException:
            self._end()
            raise
        self.start_seconds = time.monotonic() - began
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _ask(self, order: str, **words: Any) -> Any:
        """Have the server do something."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with suppress(BrokenPipeError):
            self._server.stdin.write(json.dumps({"order": order, **words}) + "\n")
            self._server.stdin.flush()
        line = self._server.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"the server of Ray's nodes is gone: {self._log.read()[-4000:]}")
        return json.loads(line)

    def start_node(self, number: int) -> None:
        """Start a node, for the first time or again, and wait until the cluster knows it."""
        answer = self._ask("start", number=number, cpus=self._cpus, object_store_bytes=self._object_store_bytes)
        self.address: str = answer["address"]
        self.raylets[number] = answer["raylet"]

    def kill_node(self, number: int) -> None:
        """Kill a node that is not the head: its raylet and all its workers, by SIGKILL."""
        if number == 0:
            raise ValueError("the head is not killed: the driver is attached to it")
        below = _descendants(self.raylets[number])
        for pid in (self.raylets.pop(number), *below):  # the raylet first, so that it starts no worker again
            self.kill(pid)
        self._ask("bury", number=number)  # the server is its parent
        _wait_until_gone(below)

    def workers(self, kind: str = "", node: int | None = None) -> list[Worker]:
        """Give the worker processes whose title holds `kind`, of all nodes or of one; those of no work are left out."""
        found = []
        if time.monotonic() > self._children_until:  # so that a short task is met: titles alone are quickly read
            self._children, self._children_until = _children(), time.monotonic() + LIST_SECONDS
        children = self._children
        for number, raylet in sorted(self.raylets.items()):
            if node in (None, number):
                for pid in children.get(raylet, []):
                    title = _title(pid)
                    known = title.startswith("ray::") and not title.startswith(_NO_WORK)
                    if known and kind in title:
                        found.append(Worker(pid, number, title))
        return found

    def kill(self, pid: int) -> bool:
        """Send SIGKILL to a process of the cluster. False if it had already ended."""
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def object_stores(self) -> list[ObjectStore]:
        """Ask the live nodes what their object stores hold."""
        return [ObjectStore(**one) for one in self._ask("object stores")]

    def idle(self, seconds: float = 30.0) -> bool:
        """Wait until no driver is left and no worker works for one. False if some still do after so many seconds."""
        end = time.monotonic() + seconds
        while busy := bool(self.workers()):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        return not busy

    def processes(self) -> list[int]:
        """All processes that belong to the cluster: those of the server's session."""
        return [pid for pid, (_, session, state) in _stats().items() if session == self._server.pid and state != "Z"]

    def _end(self) -> None:
        if self._server.stdin is not None:
            with suppress(BrokenPipeError):
                self._server.stdin.close()
        try:
            self._server.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        if self._server.stdout is not None:
            self._server.stdout.close()
        self._log.close()
        end = time.monotonic() + END_SECONDS
        while left := self.processes():
            for pid in left:
                self.kill(pid)
            if time.monotonic() > end:
                raise RuntimeError(f"processes of Ray are left: {[(pid, _title(pid)) for pid in left]}")
            time.sleep(0.02)
        shutil.rmtree(self.temporary, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------- processes

# The last ones outlive drivers.
_NO_WORK = (
    "ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::SPILL", "ray::RESTORE",
    "ray::_AutoscalingCoordinatorActor", "ray::AutoscalingCoordinator:", "ray::_StatsActor", "ray::ActorLocationTracker",
)  # fmt: skip


def _stats() -> dict[int, tuple[int, int, str]]:
    """Give the parent, the session and the state of every process."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent, _, session = (place / "stat").read_text().rpartition(")")[2].split()[:4]
            found[int(place.name)] = int(parent), int(session), state
    return found


def _children() -> dict[int, list[int]]:
    """Give the children of every process that has some."""
    found: dict[int, list[int]] = {}
    for pid, (parent, _, state) in sorted(_stats().items()):
        if state != "Z":
            found.setdefault(parent, []).append(pid)
    return found


def _descendants(pid: int) -> list[int]:
    """Give the children of a process, theirs, and so on."""
    children = _children()
    found = list(children.get(pid, []))
    for one in found:  # grows while it is gone through
        found += children.get(one, [])
    return found


def _title(pid: int) -> str:
    """Give a process's command line, which Ray's workers set; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _wait_until_gone(pids: list[int]) -> None:
    end = time.monotonic() + END_SECONDS
    while left := [pid for pid, (_, _, state) in _stats().items() if pid in pids and state != "Z"]:
        if time.monotonic() > end:
            raise RuntimeError(f"killed, but still there: {[(pid, _title(pid)) for pid in left]}")
        time.sleep(0.01)


def _shared_memory(raylet: int) -> int:
    """Give the bytes of shared memory behind the object store that anybody has touched."""
    touched = 0
    for link in Path(f"/proc/{raylet}/fd").iterdir():
        with suppress(OSError):
            if os.readlink(link).startswith("/dev/shm/plasma"):  # its file has no name any more
                touched += link.stat().st_blocks * 512
    return touched


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # moved, or not there yet
        return ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


# --------------------------------------------------------------------------------------------------------- the server

_MIB = 1 << 20
_SPILLED = re.compile(r"Spilled (\d+) MiB")


class _Nodes:
    """The nodes, in the server, which is their parent."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster: Any = Cluster(shutdown_at_exit=True)
        self._nodes: dict[int, Any] = {}
        self._logs: dict[int, list[Path]] = {}

    def start(self, number: int, cpus: int, object_store_bytes: int) -> dict[str, Any]:
        """Start a node; the first is the head."""
        logs = Path(os.environ["RAY_TMPDIR"]) / "ray" / "session_latest" / "logs"
        before = set(logs.glob("raylet*"))
        node = self._cluster.add_node(
            node_ip_address=ADDRESS,
            num_cpus=cpus,
            num_gpus=0,
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            include_log_monitor=False,
            no_monitor=True,  # of the autoscaler
        )
        self._nodes[number] = node
        self._logs[number] = sorted(set(logs.glob("raylet*")) - before)
        (raylet,) = node.all_processes["raylet"]
        return {"address": self._cluster.address, "raylet": raylet.process.pid}

    def bury(self, number: int) -> None:
        """Take the exit code of a node that was killed, and know it no more."""
        self._cluster.remove_node(self._nodes.pop(number), allow_graceful=False)

    def object_stores(self) -> list[dict[str, Any]]:
        """Give what each holds. The nodes could be asked themselves, but that takes a package of its own, `grpc`."""
        state = self._cluster.global_state
        total, available = state.total_resources_per_node(), state.available_resources_per_node()
        found = []
        for number, node in self._nodes.items():
            name = node.node_id
            capacity = int(total[name]["object_store_memory"])
            used = capacity - int(available[name].get("object_store_memory", 0))
            spilled = Path(node.get_session_dir_path()).glob(f"*spilled*{name}*/*")
            (raylet,) = node.all_processes["raylet"]
            logs = map(_read, self._logs[number])
            found.append(asdict(ObjectStore(
                number, used, capacity, _shared_memory(raylet.process.pid), sum(map(_size, spilled)),
                max((_MIB * int(mib) for log in logs for mib in _SPILLED.findall(log)), default=0),
            )))  # fmt: skip
        return found

    def end(self) -> None:
        """End all, without asking: nobody needs what they hold."""
        for node in list(self._cluster.worker_nodes):
            self._cluster.remove_node(node, allow_graceful=False)
        if self._cluster.head_node is not None:
            self._cluster.remove_node(self._cluster.head_node, allow_graceful=False)


def serve() -> None:
    """Do what each line of stdin asks, until there is none."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what Ray prints is no answer
    nodes = _Nodes()
    for line in sys.stdin:
        words = json.loads(line)
        order = words.pop("order")
        answer: Any = None
        if order == "start":
            answer = nodes.start(**words)
        elif order == "bury":
            nodes.bury(**words)
        elif order == "object stores":
            answer = nodes.object_stores()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    nodes.end()
    shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)  # whoever asked for them may have been killed


if __name__ == "__main__":
    serve()
