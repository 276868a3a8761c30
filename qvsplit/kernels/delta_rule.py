"""One token of a gated delta net, for many rows, on a CPU: its state is read and written as few times as can be.

A state holds heads · D · D numbers a row, more than a cache for a few rows, and transformers' own step in torch goes
through it a dozen times, half of them through copies. This goes through it five times, and changes it in place.

Takes the place of transformers' step in the modules of a model, for forward passes with a step of shared prefixes in
force, whose states are the batch's own; for all else it is transformers' own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from qvsplit.kernels.shared_prefix_attention import is_in_force

NAME = "torch_recurrent_gated_delta_rule"  # of transformers' step, in the modules of models that have it
NORM_EPS = 1e-6  # transformers' own, within the normalisation of queries and keys


def install(model: Any) -> None:
    """Let the gated delta nets of `model` take this step where it can be taken."""
    for name in {type(one).__module__ for one in model.modules()}:
        module = sys.modules[name]
        theirs = getattr(module, NAME, None)
        if theirs is not None and not hasattr(theirs, "instead_of"):
            setattr(module, NAME, _instead_of(theirs))


def _instead_of(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def step(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        g: torch.Tensor,
        beta: torch.Tensor,
        **given: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        state = given.get("initial_state")
        is_ours = given.get("use_qk_l2norm_in_kernel") and given.get("cu_seqlens") is None
        on_cpu = query.device.type == "cpu" and state is not None and state.dtype == torch.float32
        if is_in_force() and is_ours and on_cpu and query.shape[1] == 1:
            return delta_step(query, key, value, g, beta, state), state
        theirs_own: tuple[torch.Tensor, torch.Tensor | None] = theirs(query, key, value, g=g, beta=beta, **given)
        return theirs_own

    step.instead_of = theirs  # type: ignore[attr-defined]
    return step


def delta_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> torch.Tensor:
    """Take one token into `state`, in place, and read the state with its query.

    Args:
        query: [B, 1, key heads, D], not normalised.
        key: Likewise.
        value: [B, 1, heads, Dv].
        decay: The logarithm of what is kept of the state, [B, 1, heads].
        beta: How much of the change is taken in, [B, 1, heads].
        state: float32 [B, heads, D, Dv].

    Returns:
        [B, 1, heads, Dv], in the query's dtype.
    """
    heads = value.shape[2]
    both = torch.stack([key[:, 0], query[:, 0]], 2).float()  # [B, key heads, 2, D]
    both = both * torch.rsqrt(both.square().sum(-1, keepdim=True) + NORM_EPS)
    if heads != both.shape[1]:
        both = both.repeat_interleave(heads // both.shape[1], 1)
    keep = decay[:, 0].float().exp()[..., None]  # [B, heads, 1]
    # what the kept state says to key and query; the query's part of the change is added below
    read = torch.matmul(both, state) * keep[..., None]
    change = (value[:, 0].float() - read[:, :, 0]) * beta[:, 0].float()[..., None]  # [B, heads, Dv]
    state.mul_(keep[..., None]).addcmul_(both[:, :, 0, :, None], change[:, :, None])
    agrees = (both[:, :, 0] * both[:, :, 1]).sum(-1, keepdim=True)
    output = (read[:, :, 1] + agrees * change) * query.shape[-1] ** -0.5
    return output[:, None].to(query.dtype)
