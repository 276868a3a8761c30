"""Linear layers with their weights in oneDNN's own layout, for float32 on a CPU.

torch's matrix product lays a weight out anew for every call, which is most of the time where few rows meet a large
weight: decoding. Laid out once, at load time, the same product takes a half to a third of it (docs/decisions.md).
A packed weight takes the place of the plain one; there are never two of a layer. The values are the same, sums are
added in another order.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

ROWS = 16  # the number of rows that the layout is made for; it serves one row and a thousand well, too


class PackedLinear(nn.Module):  # type: ignore[misc]
    """`nn.Linear` with its weight packed, on a CPU. Takes and gives the weight's dtype.

    `then` names what oneDNN does to each value as it writes it: `swish` (x · sigmoid(x)), `gelu` (the exact one).
    """

    def __init__(self, linear: nn.Linear, then: str = "none") -> None:
        super().__init__()
        self.then, self.variant = then, "none" if then == "gelu" else ""
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, in_features] to […, out_features]."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, self.then, [], self.variant)
        return out


def pack(model: nn.Module) -> bool:
    """Pack every linear layer of `model` whose weight is its own; False, and nothing done, where torch cannot.

    A weight that others share (an output layer tied to the embedding) stays as it is.
    """
    if not can_pack(torch.float32):
        return False
    shared: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            shared[id(parameter)] = shared.get(id(parameter), 0) + 1
    parents = [module for module in model.modules() if type(module) is not nn.Linear]
    for parent in parents:
        for name in [name for name, child in parent.named_children() if type(child) is nn.Linear]:
            child = getattr(parent, name)
            if _fits(child) and shared[id(child.weight)] == 1:
                setattr(parent, name, PackedLinear(child))
            del child  # nothing may hold a plain weight any longer than its packed one takes to make
    return True


def _fits(linear: nn.Linear) -> bool:
    hooked: Any = getattr(linear, "_hf_hook", None)  # accelerate moves such weights about
    return linear.weight.dtype == torch.float32 and linear.weight.device.type == "cpu" and hooked is None


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Say whether this torch has the operators, and gets the right products from them."""
    if not torch.backends.mkldnn.is_available() or dtype not in {torch.float32, torch.bfloat16}:
        return False
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(24, 40).to(dtype)
    x = torch.randn(2, 3, 24, generator=generator).to(dtype)
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    with torch.no_grad():
        plain = linear(x)
        expected = {"none": plain, "swish": plain * plain.sigmoid(), "gelu": nn.functional.gelu(plain)}
        try:
            return all(torch.allclose(PackedLinear(linear, then)(x), y, **near) for then, y in expected.items())
        except (AttributeError, RuntimeError, TypeError):  # operators that torch promises to nobody
            return False
