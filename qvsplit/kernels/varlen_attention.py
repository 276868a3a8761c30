"""Find attention over sequences of unequal lengths in one call, where a library here has it for this device.

In: queries, keys and values [tokens, heads, head_dim] of sequences one behind the other, where each of them ends,
int32 [sequences + 1] from 0, and the longest's length. Out: [tokens, heads, head_dim]; no token attends to those of
another sequence, and scores are divided by √head_dim. In bfloat16 and float16 on CUDA: no library has it otherwise.

What a library has is tried before it is used, against torch's attention on one sequence after the other.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qvsplit.runtime.devices import is_out_of_memory

Varlen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]

HUB_KERNEL, HUB_MODULE = "kernels-community/flash-attn2", "flash_attn2"
TRIAL_LENGTHS = (40, 8, 16)
TRIAL_UNITS = 8  # units in the last place of 1 that a trial may be off; values are drawn from a normal distribution


@dataclass(frozen=True)
class Found:
    """What was found.

    Attributes:
        name: Of the library; None where there is none.
        function: What computes it.
        lacks: Why each library that comes before it is none, by its name.
    """

    name: str | None
    function: Varlen | None
    lacks: Mapping[str, str]


def find_varlen(device: torch.device, dtype: torch.dtype, *, heads: int, head_dim: int) -> Found:
    """Give the first library's that computes what torch's attention does, for so many heads of this width.

    Raises:
        torch.OutOfMemoryError: That says nothing of a library: try again once there is room.
    """
    lacks: dict[str, str] = {}
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return Found(None, None, {"all": f"it is for bfloat16 and float16 on CUDA, not {dtype} on {device.type}"})
    for name, load in LIBRARIES.items():
        try:
            function = load()
            off = trial(function, device, dtype, heads=heads, head_dim=head_dim)
        except (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            lacks[name] = " ".join(str(error).split())[:200] or type(error).__name__
            continue
        if off <= TRIAL_UNITS * torch.finfo(dtype).eps:
            return Found(name, function, lacks)
        lacks[name] = f"it is off by {off:.2g}"
    return Found(None, None, lacks)


def trial(function: Varlen, device: torch.device, dtype: torch.dtype, *, heads: int, head_dim: int) -> float:
    """Give the largest difference from torch's attention on three short sequences, NaN where it gives that.

    Queries, keys and values are laid out as the encoder has them: the tokens of one head are one behind the other.
    """
    numbers = torch.Generator().manual_seed(0)  # of its own: the process's random numbers stay what they are
    shape = (3, heads, sum(TRIAL_LENGTHS), head_dim)
    q, k, v = (torch.randn(shape, generator=numbers) * 2).to(device, dtype).transpose(1, 2)
    expected = torch.cat(
        [
            nn.functional.scaled_dot_product_attention(*(part.float().transpose(0, 1) for part in parts)).transpose(
                0, 1
            )
            for parts in zip(*(one.split(TRIAL_LENGTHS) for one in (q, k, v)), strict=True)
        ]
    )
    got = function(q, k, v, ends_of(TRIAL_LENGTHS, device), max(TRIAL_LENGTHS))
    return float((got.float() - expected).abs().max())


def ends_of(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Give where each sequence ends, from 0: int32 [sequences + 1]."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device)


def _of_torch() -> Varlen:
    return _varlen(importlib.import_module("torch.nn.attention.varlen").varlen_attn)  # torch 2.10 and later


def _of_flash_attn() -> Varlen:
    return _varlen(importlib.import_module("flash_attn").flash_attn_varlen_func)


def _of_kernels() -> Varlen:
    """Load the hub's build of flash-attn where the user has fetched it; nothing is downloaded."""
    from pathlib import Path

    kernels, hub = (importlib.import_module(name) for name in ("kernels", "huggingface_hub"))
    folder = Path(hub.snapshot_download(HUB_KERNEL, local_files_only=True))
    return _varlen(kernels.get_local_kernel(folder, HUB_MODULE).flash_attn_varlen_func)


def _varlen(attend: Callable[..., torch.Tensor]) -> Varlen:
    """Give a library's function with the ends and lengths of queries for keys too, as all three take them."""

    def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, longest: int) -> torch.Tensor:
        return attend(q, k, v, ends, ends, longest, longest)

    return varlen


LIBRARIES: dict[str, Callable[[], Varlen]] = {"torch": _of_torch, "flash_attn": _of_flash_attn, "kernels": _of_kernels}
