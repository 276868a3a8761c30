"""Find out which share of the machine's CPUs this process has, and keep its threads to it. Standard library only."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path

from qvsplit.runtime.control_groups import GROUPS, MOUNTED, group_folders

WAIT_POLICY = "OMP_WAIT_POLICY"
OPENMP_VARIABLES = ("OMP_", "GOMP_", "KMP_")  # what variables of OpenMP, GNU's and LLVM's begin with
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # by which a user says how many threads torch has


def affinity() -> int:
    """Give the number of CPUs that this process may be scheduled on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(groups: Path = GROUPS, mounted: Path = MOUNTED) -> float | None:
    """Give the CPUs' worth of time that a container or service may take, the least of all its groups'; None: all."""
    return min(_quotas(groups, mounted), default=None)


def usable_cpus() -> int:
    """Give the number of CPUs that this process can keep busy: by affinity and quota, a part of one as a whole."""
    quota = cpu_quota()
    return affinity() if quota is None else max(1, min(affinity(), math.ceil(quota)))


def default_workers() -> int:
    """Give how many processes read and decode where nobody says: one a usable CPU, at most eight."""
    return min(8, usable_cpus())


def _quotas(groups: Path, mounted: Path) -> Iterator[float]:
    for version, folder in group_folders("cpu", groups, mounted):
        with suppress(OSError, ValueError):  # not there, or "max"
            if version == 1:
                quota, period = ((folder / f"cpu.cfs_{what}_us").read_text() for what in ("quota", "period"))
            else:
                quota, period = (folder / "cpu.max").read_text().split()
            if int(quota) > 0:  # -1: none
                yield int(quota) / int(period)


def niceness() -> int:
    """Give how far this process stands back for others: 19 at most, 0 by default or where the system has no such."""
    return os.nice(0) if hasattr(os, "nice") else 0


def sleep_while_waiting_if_niced(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have OpenMP's threads sleep while they wait for each other, where this process is niced. Call before torch.

    By default they spin, which is quickest on a machine of their own: a small layer takes a quarter of the time. Beside
    a busy process the one that spins takes the CPU from the one it waits for, and every layer a time slice of the
    neighbour's (docs/decisions.md). OpenMP reads the variable once, when it is loaded.

    Left alone where the user has set any variable of OpenMP's.
    """
    global _wait_policy_is_ours
    if niceness() > 0 and not any(name.startswith(OPENMP_VARIABLES) for name in environment):
        environment[WAIT_POLICY] = "passive"
        _wait_policy_is_ours = True


_wait_policy_is_ours = False


def wait_policy_is_ours() -> bool:
    """Say whether `sleep_while_waiting_if_niced` set the variable in this process, and not the user."""
    return _wait_policy_is_ours


_threads_are_ours = False


def keep_threads_to_usable_cpus() -> None:
    """Let `threads_at_most` say something, for the whole process: what the command line wants, and a library not."""
    global _threads_are_ours
    _threads_are_ours = True


def threads_at_most() -> int | None:
    """Give how many threads a library should have at most; None where that is the user's affair.

    torch has a thread for every CPU of its affinity, whatever a container's quota allows: more threads than that are
    all stopped together, for most of each period, when the quota is used up.
    """
    if not _threads_are_ours or any(name in os.environ for name in THREAD_VARIABLES):
        return None
    return usable_cpus()
