"""Attention and MLP of a decoder layer, against each class of transformers that is said to compute the same."""

from __future__ import annotations

import importlib
import types

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from qvsplit.kernels.fused_decoder import (
    ATTENTIONS,
    MLP_ROWS,
    MLPS,
    NORMS,
    FusedAttention,
    FusedMLP,
    FusedNorm,
    JoinedMLP,
    is_fusable_attention,
    is_fusable_mlp,
)
from qvsplit.kernels.layout import join, lay_out
from qvsplit.kernels.packed_linear import can_pack

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="this torch has no oneDNN")

MODULES = {
    "Qwen2MLP": ("qwen2", "qwen2_vl", "qwen2_5_vl"), "Qwen3MLP": ("qwen3",),
    "Qwen3VLTextMLP": ("qwen3_vl",), "Qwen3_5MLP": ("qwen3_5",), "LlamaMLP": ("llama",), "MistralMLP": ("mistral",),
}  # fmt: skip
CONFIGS = {
    "Qwen2VLAttention": ("qwen2_vl", "Qwen2VLTextConfig"), "Qwen2_5_VLAttention": ("qwen2_5_vl", "Qwen2_5_VLTextConfig"),
    "Qwen3VLTextAttention": ("qwen3_vl", "Qwen3VLTextConfig"),
}  # fmt: skip
WIDTH, HEADS, KEY_HEADS = 48, 6, 2
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


def of_transformers(family: str, name: str):
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


def an_mlp(family: str, name: str, activation: str = "silu") -> nn.Module:
    config = types.SimpleNamespace(hidden_size=24, intermediate_size=40, hidden_act=activation, mlp_bias=False)
    sizes = (40,) if name == "Qwen3_5MLP" else ()
    torch.manual_seed(1)
    return of_transformers(family, name)(config, *sizes).requires_grad_(False)


class Holder(nn.Module):
    """What `lay_out` takes: a model with an embedding."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def get_input_embeddings(self) -> None:
        return None


def fused(part: nn.Module, way=lay_out) -> nn.Module:
    holder = Holder(part)
    way(holder)
    return holder.part


@pytest.mark.parametrize(("way", "kind"), [(lay_out, FusedMLP), (join, JoinedMLP)])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("family", "name"), [(family, name) for name in sorted(MLPS) for family in MODULES[name]])
def test_an_mlp_gives_what_transformers_own_gives(family, name, dtype, way, kind):
    mine, theirs = fused(an_mlp(family, name).to(dtype), way), an_mlp(family, name).to(dtype)
    assert type(mine) is kind
    for rows in (1, 7, MLP_ROWS + 3):
        x = torch.randn(2, rows, 24, dtype=dtype)
        torch.testing.assert_close(mine(x), theirs(x), **CLOSE[dtype])
        torch.testing.assert_close(mine(x.transpose(0, 1)), theirs(x.transpose(0, 1)), **CLOSE[dtype])


def test_every_class_of_the_lists_is_tried():
    assert all(MODULES[name] for name in MLPS) and CONFIGS.keys() == ATTENTIONS and NORM_MODULES.keys() == NORMS


def test_an_mlp_of_another_activation_or_with_biases_or_of_another_class_is_left():
    assert not is_fusable_mlp(an_mlp("llama", "LlamaMLP", "gelu"))
    biased = an_mlp("llama", "LlamaMLP")
    biased.up_proj.bias = nn.Parameter(torch.ones(40))
    assert not is_fusable_mlp(biased)
    other = of_transformers("gemma3", "Gemma3MLP")
    config = types.SimpleNamespace(hidden_size=24, intermediate_size=40, hidden_activation="gelu_pytorch_tanh")
    assert not is_fusable_mlp(other(config))


def an_attention(name: str) -> nn.Module:
    family, of_config = CONFIGS[name]
    config_class = getattr(importlib.import_module(f"transformers.models.{family}.configuration_{family}"), of_config)
    config = config_class(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, num_hidden_layers=2, head_dim=8,
        intermediate_size=64, vocab_size=9,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(2)
    made = of_transformers(family, name)(config, 0)
    for one in made.parameters():
        nn.init.normal_(one, std=0.3)
    return made.requires_grad_(False).eval()


@pytest.mark.parametrize("called", ["past_key_values", "cache"])  # by transformers 5.23, and 5.24
@pytest.mark.parametrize("way", [lay_out, join])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", sorted(ATTENTIONS))
def test_attention_gives_what_transformers_own_gives_and_caches_the_same(name, dtype, way, called):
    mine, theirs = fused(an_attention(name).to(dtype), way), an_attention(name).to(dtype)
    assert type(mine) is FusedAttention
    caches = DynamicCache(), DynamicCache()
    for new in (5, 1):  # a prompt, then one more token
        hidden = torch.randn(3, new, WIDTH).to(dtype)
        angles = torch.randn(3, new, 4).repeat(1, 1, 2)
        given = {
            "hidden_states": hidden, "position_embeddings": (angles.cos().to(dtype), angles.sin().to(dtype)),
            "attention_mask": None,
        }  # fmt: skip
        got = mine(**given, **{called: caches[0]})[0]
        expected = theirs(**given, past_key_values=caches[1])[0]
        torch.testing.assert_close(got / expected.abs().max(), expected / expected.abs().max(), **CLOSE[dtype])
    for part in ("keys", "values"):
        kept = [getattr(cache.layers[0], part) for cache in caches]
        torch.testing.assert_close(*kept, **CLOSE[dtype])


def test_norms_of_heads_are_fused_inside_attention_too():
    mine = fused(an_attention("Qwen3VLTextAttention"), join)
    assert [type(one) for one in (mine.q_norm, mine.k_norm)] == [FusedNorm, FusedNorm]


def test_attention_of_another_class_is_left():
    assert not is_fusable_attention(nn.MultiheadAttention(8, 2))


NORM_MODULES = {
    "Qwen2VLRMSNorm": "qwen2_vl", "Qwen2RMSNorm": "qwen2", "Qwen2_5_VLRMSNorm": "qwen2_5_vl",
    "Qwen3VLTextRMSNorm": "qwen3_vl", "LlamaRMSNorm": "llama",
}  # fmt: skip


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", sorted(NORMS))
def test_a_norm_gives_what_transformers_own_gives(name, dtype):
    theirs = of_transformers(NORM_MODULES[name], name)(WIDTH, eps=1e-3).to(dtype)
    nn.init.normal_(theirs.weight)
    mine, x = fused(theirs, join), torch.randn(3, 5, WIDTH).to(dtype)
    assert type(mine) is FusedNorm
    with torch.no_grad():
        torch.testing.assert_close(mine(x), theirs(x), **CLOSE[dtype])
