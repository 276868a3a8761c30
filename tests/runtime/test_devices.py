"""Devices, dtypes and memory: what is chosen, and what the system says."""

from __future__ import annotations

import pytest
import torch

from qvsplit.errors import UsageError
from qvsplit.runtime import devices

CPU = torch.device("cpu")


def test_devices_are_of_one_kind():
    assert [str(one) for one in devices.choose_devices("cpu, cpu")] == ["cpu", "cpu"]
    with pytest.raises(UsageError, match="no such device"):
        devices.choose_devices("cpu,,")


def test_a_mixture_of_devices_is_refused(monkeypatch):
    monkeypatch.setattr(devices, "choose_device", lambda name: torch.device(name))
    with pytest.raises(UsageError, match="one kind of device"):
        devices.choose_devices("cpu,cuda")


@pytest.mark.parametrize(("name", "reason"), [("nonsense", "no such device"), ("meta", "runs on cpu and cuda")])
def test_no_such_device(name, reason):
    with pytest.raises(UsageError, match=reason):
        devices.choose_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_no_cuda_here():
    assert devices.choose_device(None) == CPU
    with pytest.raises(UsageError, match="torch sees no CUDA device here; try `device=cpu`"):
        devices.choose_device("cuda")
    assert devices.peak_gpu_memory() == 0
    devices.empty_cache()


def test_without_a_driver_nothing_is_cuda(monkeypatch, tmp_path):
    """Without so much as importing torch."""
    monkeypatch.setattr(devices, "NVIDIA", tmp_path / "none")
    monkeypatch.setattr(devices, "WSL_GPU", tmp_path / "none")
    monkeypatch.setattr(devices, "choose_devices", lambda name: pytest.fail("asked torch"))
    assert not devices.is_cuda(None)
    assert not devices.is_cuda("cuda")


@pytest.mark.parametrize(
    ("name", "device", "chosen"),
    [
        (None, "cpu", "float32"),
        (None, "cuda", "bfloat16"),
        ("float16", "cpu", "float16"),
        ("float32", "cuda", "float32"),
    ],
)
def test_a_dtype_is_chosen(name, device, chosen):
    dtype = devices.choose_dtype(name, torch.device(device), "bfloat16")
    assert devices.dtype_name(dtype) == chosen
    with pytest.raises(UsageError, match="`dtype` int8: choose one of float32"):
        devices.choose_dtype("int8", CPU, "bfloat16")


@pytest.mark.parametrize(
    ("available", "in_groups", "free"),
    [(5, None, 5), (5, 3, 3), (5, 0, 0), (None, 3, 3), (None, None, None), (5, 9, 5)],
)
def test_free_memory_is_the_least_of_the_machines_and_the_groups(monkeypatch, available, in_groups, free):
    monkeypatch.setattr(devices, "bytes_in_kernel_file", lambda file, name: available)
    monkeypatch.setattr(devices, "free_in_groups", lambda: in_groups)
    assert devices.free_memory(CPU) == free


@pytest.mark.parametrize(
    ("flags", "has"), [("fpu avx512f avx512_bf16", True), ("fpu amx_bf16", True), ("fpu avx512f", False), (None, False)]
)
def test_bfloat16_units_are_known_by_the_flags(monkeypatch, tmp_path, flags, has):
    file = tmp_path / "cpuinfo"
    if flags is not None:
        file.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(devices, "Path", lambda name: file)
    assert devices.has_bfloat16_units() is has


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("allocate memory"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error, is_it):
    assert devices.is_out_of_memory(error) is is_it
