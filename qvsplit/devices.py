"""Where to compute, and in which dtype, when the user says so or leaves it open."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from qvsplit.errors import UsageError
from qvsplit.recipe import DTYPE_BYTES

if TYPE_CHECKING:
    import torch

NVIDIA, WSL_GPU = Path("/dev/nvidiactl"), Path("/dev/dxg")  # without these there is no CUDA device


def choose_device(name: str | None) -> torch.device:
    """`name` as a torch device; None is the first CUDA device, else the CPU. UsageError if it is not there."""
    import torch

    if name is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: no such device; try cpu or cuda") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device {name}: torch sees no CUDA device here; try --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
        return torch.device("cuda", device.index or 0)
    if device.type != "cpu":
        raise UsageError(f"--device {name}: qvsplit runs on cpu and cuda")
    return device


def choose_devices(names: str | None) -> list[torch.device]:
    """Several, given as `cuda:0,cuda:1`, each as `choose_device` has it; one that is named twice computes two batches.

    UsageError for a mixture of CPU and CUDA, which would not give the same numbers.
    """
    devices = [choose_device(name.strip()) for name in names.split(",")] if names else [choose_device(None)]
    if len({device.type for device in devices}) > 1:
        raise UsageError(f"--device {names}: one album's numbers come from one kind of device")
    return devices


def free_memory(device: torch.device) -> int | None:
    """Bytes that could be allocated now; None where nobody tells. On a CPU a container's limit counts, too."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    available = _told_in_kilobytes("/proc/meminfo", "MemAvailable")
    free = [] if available is None else [available]
    with suppress(OSError, ValueError):  # cgroup v2; "max" is no number
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free.append(limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return max(0, min(free)) if free else None


def _told_in_kilobytes(file: str, name: str) -> int | None:
    """A line `name: N kB` of one of the kernel's files, in bytes; None where there is none."""
    with suppress(OSError, ValueError):
        for line in Path(file).read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def choose_dtype(name: str | None, device: torch.device, stored: str) -> torch.dtype:
    """`name` as a torch dtype; None is float32 on a CPU, on CUDA what the checkpoint is `stored` in. UsageError else.

    A CPU without bfloat16 units computes in it seven times slower than in float32, and in float16 far slower still.
    """
    import torch

    if name is not None and name not in DTYPE_BYTES:
        raise UsageError(f"--dtype {name}: choose one of {', '.join(DTYPE_BYTES)}")
    if name is None:
        return torch.float32 if device.type == "cpu" else getattr(torch, stored)
    return getattr(torch, name)


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware, by what the system says of it."""
    with suppress(OSError):
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
        return bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))
    return False


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16, and so on."""
    return str(dtype).removeprefix("torch.")


_LIMITS_ARE_OURS = False
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def give_back_freed_memory() -> None:
    """Have glibc return freed blocks of a MiB and more to the system at once, for the whole process.

    By default it raises that limit to 32 MiB as it goes, and weights and activations of that size then scatter the
    heap: 0.4 GB on a 2B's tower in float32 (docs/decisions.md). Other C libraries are left as they are.
    """
    global _LIMITS_ARE_OURS
    _LIMITS_ARE_OURS = _set_limits({_M_MMAP_THRESHOLD: 1 << 20})


def keep_freed_activations() -> None:
    """Once weights are in place: keep freed blocks below 16 MiB, up to 128 MiB of them.

    A forward pass asks for such blocks thousands of times; in fresh pages each time they cost it some 5 %. Does
    nothing where `give_back_freed_memory` was not called: other callers' allocators are left alone.
    """
    if _LIMITS_ARE_OURS:
        _set_limits({_M_MMAP_THRESHOLD: 16 << 20, _M_TRIM_THRESHOLD: 128 << 20})


def _set_limits(limits: Mapping[int, int]) -> bool:
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        return all(libc.mallopt(name, value) for name, value in limits.items())
    return False


def peak_memory() -> int:
    """The most memory this process ever held, in bytes.

    From the kernel's own account of it; getrusage's, where there is none, is inherited from whoever started us.
    """
    peak = _told_in_kilobytes("/proc/self/status", "VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if peak is None else peak


def is_cuda(name: str | None) -> bool:
    """Whether `choose_device(name)` is a CUDA device. Imports torch only where there may be one."""
    if name == "cpu" or not (NVIDIA.exists() or WSL_GPU.exists()):
        return False
    return str(choose_devices(name)[0].type) == "cuda"


def empty_cache() -> None:
    """Have torch give back what it keeps of a GPU's memory without using it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: torch's error on CUDA, Python's, or torch's on a CPU, told only by its words."""
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
