"""Linear layers in oneDNN's layout: the plain ones' products, never two weights of a layer, and only where it works."""

from __future__ import annotations

import weakref

import pytest
import torch

from qvsplit.kernels import packed_linear
from qvsplit.kernels.packed_linear import PackedLinear, can_pack, pack

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="this torch has no oneDNN")


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
])  # fmt: skip
def test_what_is_done_to_each_value_as_it_is_written(then, function):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(24, 40), torch.randn(5, 24)
    with torch.no_grad():
        torch.testing.assert_close(PackedLinear(linear, then)(x), function(linear(x)), rtol=1e-4, atol=1e-5)


def test_packing_never_holds_two_weights_of_a_layer(monkeypatch):
    model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()) for _ in range(5)])
    plain = [weakref.ref(layer[0].weight) for layer in model]
    alive = []
    make = PackedLinear.__init__

    def watched(self, linear, *then):
        alive.append(sum(weight() is not None for weight in plain))
        make(self, linear, *then)

    monkeypatch.setattr(PackedLinear, "__init__", watched)
    assert pack(model)
    assert alive == [5, 4, 3, 2, 1]


def test_a_weight_that_is_shared_stays_as_it_is():
    """So does one of another dtype, and one that accelerate moves about."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in ("own", "tied", "narrow", "moved")})
    model["embedding"] = torch.nn.Embedding(8, 8)
    model["embedding"].weight = model["tied"].weight
    model["narrow"].bfloat16()
    model["moved"]._hf_hook = object()
    assert pack(model)
    assert [name for name, module in model.items() if isinstance(module, PackedLinear)] == ["own"]
    assert model["tied"].weight is model["embedding"].weight


@pytest.mark.parametrize("trouble", ["wrong", "missing"])
def test_a_torch_that_cannot_pack_is_left_alone(monkeypatch, request, trouble):
    def broken(self, x):
        if trouble == "missing":
            raise AttributeError("no such operator")
        return torch.zeros(*x.shape[:-1], self.out_features)

    monkeypatch.setattr(PackedLinear, "forward", broken)
    can_pack.cache_clear()  # it is tried once a process
    request.addfinalizer(can_pack.cache_clear)
    assert not can_pack(torch.float32)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    assert not pack(model)
    assert type(model[0]) is torch.nn.Linear


def test_dtypes_that_are_never_packed():
    assert not packed_linear.can_pack(torch.float16)
