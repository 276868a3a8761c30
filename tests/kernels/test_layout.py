"""Where a model's tensors go: every value once, in the module that computes with it, and nothing held twice."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from qvsplit.kernels.layout import Layout, Plain, lay_out
from qvsplit.kernels.packed_linear import PackedLinear, can_pack
from qvsplit.kernels.vocabulary import OutputLayer, StoredEmbedding

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="this torch has no oneDNN")
VOCABULARY, WIDTH = 8200, 8  # more than one slice


class Small(nn.Module):
    """A model with an embedding, a norm, a linear layer with a bias, and an output layer, tied or not."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.all_tied_weights_keys = {"lm_head.weight": "embed.weight"} if tied else {}
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.linear(self.norm(self.embed(ids))))


def tensors_of(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a checkpoint would hold."""
    return {name: tensor.detach().to(dtype) for name, tensor in model.named_parameters()}


def filled(placing: type, stored: dict[str, torch.Tensor], *, tied: bool) -> nn.Module:
    """A model laid out from tensors that all come in the same memory, as a reader lends it."""
    with torch.device("meta"):
        model = Small(tied=tied)
    one, memory = placing(model), torch.empty(VOCABULARY * WIDTH * 4, dtype=torch.uint8)
    for name, tensor in stored.items():
        lent = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        one.place(name, lent, True)
        memory.fill_(0)
    one.finish()
    return model


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.tensor([[0, 5, VOCABULARY - 1], [8191, 8192, 8193]])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored_as", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("placing", [Layout, Plain])
def test_a_model_filled_from_lent_memory_computes_what_the_whole_one_does(ids, tied, stored_as, placing):
    torch.manual_seed(3)
    whole = Small(tied=tied).requires_grad_(False)
    stored = tensors_of(whole, stored_as)
    for name, parameter in whole.named_parameters():
        parameter.copy_(stored[name])
    model = filled(placing, stored, tied=tied)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), whole(ids), rtol=1e-5, atol=1e-5)
        assert torch.equal(model.embed(ids), whole.embed(ids))  # widening is exact
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_tied_matrix_that_is_computed_in_as_it_is_stored_is_held_once():
    stored = tensors_of(Small(tied=True), torch.float32)
    model = filled(Layout, stored, tied=True)
    assert type(model.embed) is nn.Embedding
    assert model.lm_head.plain.data_ptr() == model.embed.weight.data_ptr()


def test_a_tied_matrix_that_is_widened_is_looked_up_as_it_is_stored():
    stored = tensors_of(Small(tied=True), torch.bfloat16)
    model = filled(Layout, stored, tied=True)
    assert type(model.embed) is StoredEmbedding
    assert model.embed.weight.dtype == torch.bfloat16
    assert "embed.weight" not in dict(model.named_parameters())
    assert len(model.lm_head.slices) == 2


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_stored_wider_than_it_is_computed_is_not_held_as_wide(tied):
    stored = tensors_of(Small(tied=tied), torch.float32)
    with torch.device("meta"):
        model = Small(tied=tied).bfloat16()
    one = Layout(model)
    for name, tensor in stored.items():
        one.place(name, tensor, False)
    one.finish()
    assert type(model.embed) is nn.Embedding and model.embed.weight.dtype == torch.bfloat16
    assert (model.lm_head.plain is not None) == tied


class Scaled(nn.Embedding):
    """An embedding that does more, as Gemma's."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 3


@pytest.mark.parametrize("how", ["scaled", "output with a bias", "padding"])
@pytest.mark.parametrize("tied", [True, False])
def test_ends_of_other_kinds_compute_what_they_did(ids, tied, how):
    torch.manual_seed(4)
    model = Small(tied=False)
    if how == "output with a bias":
        model.lm_head = nn.Linear(WIDTH, VOCABULARY)
    else:
        kind, more = (Scaled, {}) if how == "scaled" else (nn.Embedding, {"padding_idx": 0})
        model.embed = kind(VOCABULARY, WIDTH, **more)
    if tied:
        model.all_tied_weights_keys = {"lm_head.weight": "embed.weight"}
        model.lm_head.weight = model.embed.weight
    model.requires_grad_(False)
    expected = model(ids)
    lay_out(model)
    torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)


def test_an_output_layer_of_its_own_is_packed_in_slices():
    model = filled(Layout, tensors_of(Small(tied=False), torch.float32), tied=False)
    assert len(model.lm_head.slices) == 2 and model.lm_head.plain is None
    assert type(model.linear) is PackedLinear


def test_laying_out_never_holds_two_weights_of_a_layer(monkeypatch):
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

        def get_input_embeddings(self) -> None:
            return None

    model = Deep().requires_grad_(False)
    plain = [weakref.ref(layer.weight) for layer in model.layers]
    alive, lay = [], PackedLinear.lay_out

    def watched(self, weight):
        alive.append(sum(one() is not None for one in plain))
        lay(self, weight)

    monkeypatch.setattr(PackedLinear, "lay_out", watched)
    lay_out(model)
    assert alive == [4, 3, 2, 1, 0]


def test_a_weight_that_is_shared_and_one_of_another_dtype_stay_as_they_are():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.shared, self.twin, self.narrow = (nn.Linear(8, 8, bias=False) for _ in range(4))
            self.twin.weight = self.shared.weight
            self.narrow.half()

        def get_input_embeddings(self) -> None:
            return None

    model, x = Odd().requires_grad_(False), torch.randn(2, 8)
    expected = [model.own(x), model.shared(x), model.twin(x), model.narrow(x.half())]
    lay_out(model)
    assert [type(one).__name__ for one in model.children()] == ["PackedLinear", "Linear", "Linear", "Linear"]
    got = [model.own(x), model.shared(x), model.twin(x), model.narrow(x.half())]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert model.twin.weight.data_ptr() == model.shared.weight.data_ptr()


def test_an_output_layer_gives_what_a_linear_one_does():
    weight, hidden = torch.randn(VOCABULARY, WIDTH), torch.randn(2, 3, WIDTH)
    cast = lambda tensor, dtype: tensor.to(dtype)  # noqa: E731
    for layer in (OutputLayer.of(weight, torch.float32, cast), OutputLayer((), weight)):
        torch.testing.assert_close(layer(hidden), nn.functional.linear(hidden, weight), rtol=1e-5, atol=1e-5)
