"""Ask the kernel about memory, and have glibc give back what was freed. Standard library only."""

from __future__ import annotations

import ctypes
import gc
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from qvsplit.runtime.control_groups import GROUPS, MOUNTED, group_folders

GROUP_FILES = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}


def bytes_in_kernel_file(file: str, name: str) -> int | None:
    """Read a line `name: N kB` of one of the kernel's files, in bytes; None where there is none."""
    with suppress(OSError, ValueError):
        for line in Path(file).read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause Python's cycle collector where very many objects are made that hold no cycles.

    It would look at all of them again and again: reading 10,000 rows takes three times as long with it.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def peak_memory() -> int:
    """Give the most memory this process ever held, in bytes.

    From the kernel's own account of it; getrusage's, where there is none, is inherited from whoever started us.
    """
    peak = bytes_in_kernel_file("/proc/self/status", "VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if peak is None else peak


def machine_memory() -> int:
    """Give the bytes of memory that this machine has, or its container or service may take, or this process."""
    most = [bytes_in_kernel_file("/proc/meminfo", "MemTotal") or 0, *_group_limits()]
    process = resource.getrlimit(resource.RLIMIT_AS)[0]
    return min(most if process == resource.RLIM_INFINITY else [*most, process])


def _group_limits(groups: Path = GROUPS, mounted: Path = MOUNTED) -> Iterator[int]:
    """Give the limits of the control groups that this process is in, of either version."""
    for version, folder in group_folders("memory", groups, mounted):
        with suppress(OSError, ValueError):  # not there, or "max"
            yield int((folder / GROUP_FILES[version][0]).read_text())


def free_in_groups(groups: Path = GROUPS, mounted: Path = MOUNTED) -> int | None:
    """Give the bytes that the control groups of this process leave it, those above too; None where none has a limit.

    Of each group that is its limit less what all of its processes use.
    """
    return min(_left_by_groups(groups, mounted), default=None)


def _left_by_groups(groups: Path, mounted: Path) -> Iterator[int]:
    for version, folder in group_folders("memory", groups, mounted):
        with suppress(OSError, ValueError):  # not there, or "max"
            limit, used = GROUP_FILES[version]
            yield max(0, int((folder / limit).read_text()) - int((folder / used).read_text()))


_limits_are_ours = False
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def give_back_freed_memory() -> None:
    """Have glibc return freed blocks of a MiB and more to the system at once, for the whole process.

    By default it raises that limit to 32 MiB as it goes, and weights and activations of that size then scatter the
    heap: 0.4 GB on a 2B's encoder in float32 (docs/decisions.md). Other C libraries are left as they are.
    """
    global _limits_are_ours
    _limits_are_ours = _set_limits({_M_MMAP_THRESHOLD: 1 << 20})


def keep_freed_activations() -> None:
    """Once weights are in place: keep freed blocks below 16 MiB, up to 128 MiB of them.

    A forward pass asks for such blocks thousands of times; in fresh pages each time they cost it some 5 %. Does
    nothing where `give_back_freed_memory` was not called: other callers' allocators are left alone.
    """
    if _limits_are_ours:
        _set_limits({_M_MMAP_THRESHOLD: 16 << 20, _M_TRIM_THRESHOLD: 128 << 20})


def give_back_now() -> None:
    """Give all that was freed back to the system, of every thread's, where `give_back_freed_memory` was called.

    For a moment at which much was freed and something large of another kind comes: pages that a forward pass used are
    of no use to what writes its features.
    """
    if _limits_are_ours:
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _set_limits(limits: Mapping[int, int]) -> bool:
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        return all(libc.mallopt(name, value) for name, value in limits.items())
    return False
