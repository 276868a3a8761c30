"""Linear layers with their weights in oneDNN's own layout, for float32 and bfloat16 on a CPU.

torch's matrix product lays a weight out anew for every call, which is most of the time where few rows meet a large
weight: decoding. Laid out once, at load time, the same product takes a half to a third of it (docs/decisions.md).
A packed weight takes the place of the plain one; there are never two of a layer. The values are the same, sums are
added in another order.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

VARIANTS = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}  # as torch's operator calls them
ROWS = 16  # the number of rows that the layout is made for; it serves one row and a thousand well, too


class PackedLinear(nn.Module):  # type: ignore[misc]
    """`nn.Linear` with its weight packed, on a CPU. Takes and gives the weight's dtype.

    `then` names what oneDNN does to each value as it writes it: `swish` (x · sigmoid(x)), `gelu` (the exact one),
    `gelu_tanh` (its approximation by tanh).
    Of a linear layer on torch's "meta" device it is empty until `lay_out` gives it a weight.
    """

    def __init__(self, linear: nn.Linear, then: str = "none") -> None:
        super().__init__()
        self.then, self.variant = VARIANTS.get(then, (then, ""))
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        if not linear.weight.is_meta:
            self.lay_out(linear.weight.detach())

    def lay_out(self, weight: torch.Tensor) -> None:
        """Take the weight, [out_features, in_features], in the dtype that is computed in. It is not kept."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, in_features] to […, out_features]."""
        return self.product(x, self.then, self.variant)

    def product(self, x: torch.Tensor, then: str = "none", variant: str = "") -> torch.Tensor:
        """Compute with another `then` than the layer's own."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, then, [], variant)
        return out

    def times(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Compute the layer's output times `other`, value by value, in one pass."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.packed, self.bias, "mul")
        return out


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Say whether this torch has the operators, and gets the right products from them."""
    if not torch.backends.mkldnn.is_available() or dtype not in {torch.float32, torch.bfloat16}:
        return False
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(24, 40).to(dtype)
    x, other = (
        torch.randn(2, 3, 24, generator=generator).to(dtype),
        torch.randn(2, 3, 40, generator=generator).to(dtype),
    )
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    with torch.no_grad():
        plain = linear(x)
        gelu, tanh = nn.functional.gelu(plain), nn.functional.gelu(plain, approximate="tanh")
        expected = {"none": plain, "swish": plain * plain.sigmoid(), "gelu": gelu, "gelu_tanh": tanh}
        try:
            return torch.allclose(PackedLinear(linear).times(x, other), plain * other, **near) and all(
                torch.allclose(PackedLinear(linear, then)(x), y, **near) for then, y in expected.items()
            )
        except (AttributeError, RuntimeError, TypeError):  # operators that torch promises to nobody
            return False
