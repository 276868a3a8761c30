"""Choose where to compute and in which dtype, and ask how much memory a device has. Imports torch lazily."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from qvsplit.errors import UsageError
from qvsplit.runtime.cpus import threads_at_most
from qvsplit.runtime.dtypes import DTYPE_BYTES
from qvsplit.runtime.memory import bytes_in_kernel_file, free_in_groups

if TYPE_CHECKING:
    import torch

OUT_OF_MEMORY = ("allocate memory", "CUDA error: out of memory")  # in messages of torch's plain RuntimeErrors
NVIDIA, WSL_GPU = Path("/dev/nvidiactl"), Path("/dev/dxg")  # without these there is no CUDA device


def choose_device(name: str | None) -> torch.device:
    """Give `name` as a torch device; None is the first CUDA device, else the CPU. UsageError if it is not there.

    In the command line torch has no more threads afterwards than CPUs that it may use.
    """
    import torch

    _limit_threads()
    if name is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"`device` {name}: no such device; try cpu or cuda") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"`device` {name}: torch sees no CUDA device here; try `device=cpu`")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"`device` {name}: there are {torch.cuda.device_count()} CUDA devices")
        return torch.device("cuda", device.index or 0)
    if device.type != "cpu":
        raise UsageError(f"`device` {name}: qvsplit runs on cpu and cuda")
    return device


def _limit_threads() -> None:
    import torch

    most = threads_at_most()
    if most is not None and most < torch.get_num_threads():
        torch.set_num_threads(most)


def choose_devices(names: str | None) -> list[torch.device]:
    """Give several devices, named as in `cuda:0,cuda:1`; one that is named twice computes two batches.

    UsageError for a mixture of CPU and CUDA, which would not give the same numbers.
    """
    devices = [choose_device(name.strip()) for name in names.split(",")] if names else [choose_device(None)]
    if len({device.type for device in devices}) > 1:
        raise UsageError(f"`device` {names}: one store's numbers come from one kind of device")
    return devices


def free_memory(device: torch.device) -> int | None:
    """Give the bytes that could be allocated now; None where it is not known.

    On a CPU the limit of a container or service counts, of each that this process is in.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    known = (bytes_in_kernel_file("/proc/meminfo", "MemAvailable"), free_in_groups())
    return min((free for free in known if free is not None), default=None)


def choose_dtype(name: str | None, device: torch.device, stored: str) -> torch.dtype:
    """Give `name` as a torch dtype; None is float32 on a CPU, on CUDA what the checkpoint is `stored` in.

    A CPU without bfloat16 units computes in it seven times slower than in float32, and in float16 far slower still.

    Raises:
        UsageError: There is no such dtype.
    """
    import torch

    if name is not None and name not in DTYPE_BYTES:
        raise UsageError(f"`dtype` {name}: choose one of {', '.join(DTYPE_BYTES)}")
    if name is None:
        return torch.float32 if device.type == "cpu" else getattr(torch, stored)
    return getattr(torch, name)


def has_bfloat16_units() -> bool:
    """Say whether this CPU multiplies bfloat16 in hardware, by what the system says of it."""
    with suppress(OSError):
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
        return bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))
    return False


def dtype_name(dtype: torch.dtype) -> str:
    """Give `bfloat16` for torch.bfloat16, and so on."""
    return str(dtype).removeprefix("torch.")


def peak_gpu_memory() -> int:
    """Give the most bytes that torch held on a GPU, of that which took the most; 0 where there is none."""
    import torch

    if not torch.cuda.is_available():
        return 0
    return max(int(torch.cuda.max_memory_allocated(number)) for number in range(torch.cuda.device_count()))


def is_cuda(name: str | None) -> bool:
    """Say whether `choose_device(name)` is a CUDA device. Imports torch only where there may be one."""
    if name == "cpu" or not (NVIDIA.exists() or WSL_GPU.exists()):
        return False
    return str(choose_devices(name)[0].type) == "cuda"


def empty_cache() -> None:
    """Have torch give back what it keeps of a GPU's memory without using it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Say whether memory ran out: torch's error on CUDA, Python's, or one of torch that is known only by its words.

    Those are a CPU's, `can't allocate memory`, and `CUDA error: out of memory`, which is what pinning memory that
    cannot be had, or starting on a GPU that is full, is answered with.
    """
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
