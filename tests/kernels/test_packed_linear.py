"""Linear layers in oneDNN's layout: the plain ones' products, and only where it works."""

from __future__ import annotations

import pytest
import torch

from qvsplit.kernels.packed_linear import PackedLinear, can_pack

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 96), (3, 17, 96), (500, 96)])
def test_a_packed_layer_gives_the_plain_ones_product(bias, shape):
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 40, bias=bias)
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("then", "function"), [
    ("swish", torch.nn.functional.silu), ("gelu", torch.nn.functional.gelu), ("none", lambda y: y),
    ("gelu_tanh", lambda y: torch.nn.functional.gelu(y, approximate="tanh")),
])  # fmt: skip
def test_what_is_done_to_each_value_as_it_is_written(then, function):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(24, 40), torch.randn(5, 24) * 3
    with torch.no_grad():
        torch.testing.assert_close(PackedLinear(linear, then)(x), function(linear(x)), rtol=1e-4, atol=1e-5)


def test_a_product_that_is_multiplied_as_it_is_written():
    torch.manual_seed(0)
    linear, x, other = torch.nn.Linear(24, 40), torch.randn(5, 24), torch.randn(5, 40)
    with torch.no_grad():
        torch.testing.assert_close(PackedLinear(linear).times(x, other), linear(x) * other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trouble", ["wrong", "missing"])
@pytest.mark.parametrize("operator", ["product", "times"])
def test_a_torch_that_cannot_pack_is_left_alone(monkeypatch, request, trouble, operator):
    def broken(self, x, *others):
        if trouble == "missing":
            raise AttributeError("no such operator")
        return torch.zeros(*x.shape[:-1], self.out_features)

    monkeypatch.setattr(PackedLinear, operator, broken)
    can_pack.cache_clear()  # it is tried once a process
    request.addfinalizer(can_pack.cache_clear)
    assert not can_pack(torch.float32)


def test_dtypes_that_are_never_packed():
    assert not can_pack(torch.float16)
