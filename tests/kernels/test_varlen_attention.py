"""Which library's attention over unequal lengths is used: the first that computes what torch's attention does."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from qvsplit.kernels import varlen_attention
from qvsplit.kernels.varlen_attention import ends_of, find_varlen, trial
from tests.kernels.test_fused_encoder import by_segments


def across(q, k, v, ends, longest):
    """One that forgets where sequences end."""
    return by_segments(q, k, v, ends[[0, -1]], int(ends[-1]))


def unscaled(q, k, v, ends, longest):
    return by_segments(q * q.shape[-1] ** 0.5, k, v, ends, longest)


def not_a_number(q, k, v, ends, longest):
    return by_segments(q, k, v * torch.nan, ends, longest)


def strideless(q, k, v, ends, longest):
    """One that takes every tensor for a contiguous one."""
    as_if = [torch.as_strided(one, one.shape, (one.shape[1] * one.shape[2], one.shape[2], 1)) for one in (q, k, v)]
    return by_segments(*as_if, ends, longest)


def lacking(*given):
    raise RuntimeError("FlashAttention only\nsupports Ampere GPUs or newer")


@pytest.fixture
def as_if_cuda(monkeypatch):
    """Look for libraries as on a GPU; what is tried is tried on the CPU."""
    real = trial
    monkeypatch.setattr(
        varlen_attention, "trial", lambda function, device, *args, **more: real(function, torch.device("cpu"), *args, **more)
    )  # fmt: skip

    def find(dtype=torch.bfloat16, **libraries):
        monkeypatch.setattr(
            varlen_attention, "LIBRARIES", {name: lambda one=one: one for name, one in libraries.items()}
        )
        return find_varlen(torch.device("cuda"), dtype, heads=2, head_dim=16)

    return find


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_computes_something_else_is_not_used(as_if_cuda, dtype):
    found = as_if_cuda(dtype, a=across, b=unscaled, c=not_a_number, d=strideless, e=lacking, f=by_segments, g=across)
    assert (found.name, found.function) == ("f", by_segments)
    assert list(found.lacks) == ["a", "b", "c", "d", "e"]
    assert all(found.lacks[name].startswith("it is off by") for name in "abcd")
    assert found.lacks["e"] == "FlashAttention only supports Ampere GPUs or newer"


def test_where_nothing_is_right_nothing_is_used(as_if_cuda):
    found = as_if_cuda(a=across)
    assert (found.name, found.function) == (None, None)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")]
)
def test_running_out_of_memory_says_nothing_of_a_library(as_if_cuda, error):
    def large(*given):
        raise error

    with pytest.raises(RuntimeError, match="out of memory"):
        as_if_cuda(a=large, b=by_segments)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_it_is_for_few_bits_on_cuda(device, dtype):
    found = find_varlen(torch.device(device), dtype, heads=2, head_dim=16)
    assert found.function is None
    assert list(found.lacks) == ["all"]


def test_a_trial_leaves_the_random_numbers_of_the_process_alone():
    state = torch.random.get_rng_state()
    assert trial(by_segments, torch.device("cpu"), torch.bfloat16, heads=2, head_dim=16) < 0.03
    assert torch.equal(torch.random.get_rng_state(), state)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0):
    """As flash-attn has it."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k
    return by_segments(q, k, v, cu_seqlens_q, max_seqlen_q)


def test_libraries_are_called_as_they_want_it(monkeypatch, tmp_path):
    def snapshot_download(name, *, local_files_only):
        assert (name, local_files_only) == ("kernels-community/flash-attn2", True)
        return str(tmp_path)

    flash = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_local_kernel=lambda *given: given == (tmp_path, "flash_attn2") and flash))  # fmt: skip
    for name in ("flash_attn", "kernels"):
        assert (
            trial(varlen_attention.LIBRARIES[name](), torch.device("cpu"), torch.float32, heads=2, head_dim=16) < 1e-5
        )


def test_torchs_own_is_called_as_it_wants_it(monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch 2.10 and later have it")
    real = varlen.varlen_attn
    seen = []
    monkeypatch.setattr(varlen, "varlen_attn", lambda *given: seen.append(given) or given[0])
    q = torch.zeros(5, 2, 16)
    ends = ends_of((2, 3), torch.device("cpu"))
    varlen_attention.LIBRARIES["torch"]()(q, q, q, ends, 3)
    import inspect

    (given,) = seen
    bound = inspect.signature(real).bind(*given).arguments
    assert bound["cu_seq_q"] is bound["cu_seq_k"] is ends
    assert (bound["max_q"], bound["max_k"], ends.tolist(), ends.dtype) == (3, 3, [0, 2, 5], torch.int32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_cuda_there_is_one_for_the_heads_of_qwen2_vl(dtype):
    found = find_varlen(torch.device("cuda"), dtype, heads=16, head_dim=80)
    if found.function is None:
        pytest.skip(f"no library here has it: {dict(found.lacks)}")
    assert found.name in varlen_attention.LIBRARIES
