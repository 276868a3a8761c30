"""The parts of a decoder layer, written for speed. transformers' own modules are the reference.

The same sums in another order, in float32 within 1e-5 of the reference, relative. What is done otherwise: queries,
keys and values are one matrix product; rotary positions are written straight to where attention reads. On a CPU the MLP
goes some rows at a time, so that its wide intermediates stay in the cache, and oneDNN applies SiLU and the product with
the gate as it writes. On a GPU, where a step of decoding is bound by the number of kernels that are started, gate and
input are one product, and a norm is one kernel. Residuals, attention and caches are transformers' own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qvsplit.kernels.packed_linear import PackedLinear

# Rows that go through the MLP at a time
MLP_ROWS = 512

# Classes of transformers whose forward is down(SiLU(gate(x)) · up(x)), and those whose forward is projections, norms of
# heads where there are any, rotary positions, attention and the output projection. Tests hold each against the class.
MLPS = frozenset({
    "Qwen2MLP", "Qwen3VLTextMLP", "Qwen3_5MLP", "Qwen3MLP", "LlamaMLP", "MistralMLP",
})  # fmt: skip
ATTENTIONS = frozenset({"Qwen2VLAttention", "Qwen2_5_VLAttention", "Qwen3VLTextAttention"})
# Those whose forward is weight · x / sqrt(mean(x²) + epsilon)
NORMS = frozenset({"Qwen2VLRMSNorm", "Qwen2RMSNorm", "Qwen2_5_VLRMSNorm", "Qwen3VLTextRMSNorm", "LlamaRMSNorm"})


def is_fusable_mlp(module: nn.Module) -> bool:
    """Say whether `FusedMLP` computes what a module of transformers does."""
    if type(module).__name__ not in MLPS or not isinstance(module.act_fn, nn.SiLU | _silu_class()):
        return False
    return all(type(one) is nn.Linear and one.bias is None for one in module.children() if one is not module.act_fn)


def is_fusable_attention(module: nn.Module) -> bool:
    """Say whether `FusedAttention` computes what a module of transformers does."""
    if type(module).__name__ not in ATTENTIONS:
        return False
    joined = [module.q_proj, module.k_proj, module.v_proj]
    return all(type(one) is nn.Linear for one in joined) and len({one.bias is None for one in joined}) == 1


def is_fusable_norm(module: nn.Module) -> bool:
    """Say whether `FusedNorm` computes what a module of transformers does."""
    return type(module).__name__ in NORMS


def _silu_class() -> type[nn.Module]:
    from transformers.activations import ACT2CLS

    silu: type[nn.Module] = ACT2CLS["silu"]
    return silu


class FusedMLP(nn.Module):  # type: ignore[misc]
    """An MLP with a gate. Made of transformers' own on torch's "meta" device; its weights come afterwards."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj = PackedLinear(mlp.gate_proj, "swish")
        self.up_proj, self.down_proj = PackedLinear(mlp.up_proj), PackedLinear(mlp.down_proj)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, width] to […, width]."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= MLP_ROWS:
            return self._some(rows).view(x.shape)
        out = torch.empty_like(rows)
        for some, their in zip(rows.split(MLP_ROWS), out.split(MLP_ROWS), strict=True):
            their.copy_(self._some(some))
        return out.view(x.shape)

    def _some(self, rows: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.up_proj.times(rows, self.gate_proj(rows)))


class JoinedMLP(nn.Module):  # type: ignore[misc]
    """An MLP with a gate, made of transformers' own with its weights: four operations where that has five."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up, self.down_proj = joined([mlp.gate_proj, mlp.up_proj]), mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, width] to […, width]."""
        gate, up = self.gate_up(x).chunk(2, -1)
        out: torch.Tensor = self.down_proj(nn.functional.silu(gate).mul_(up))
        return out


class FusedNorm(nn.Module):  # type: ignore[misc]
    """A root mean square norm as one operation, where transformers has seven. It rounds once, that twice."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, float(norm.variance_epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, width] to […, width]."""
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class FusedAttention(nn.Module):  # type: ignore[misc]
    """Attention of a decoder layer, made of transformers' own and of what computes its products.

    Args of the constructor:
        attention: transformers'.
        qkv: Gives queries, keys and values side by side, [B, q, width] to [B, q, (H + 2K)·D].
        output: The output projection.
    """

    def __init__(self, attention: Any, qkv: nn.Module, output: nn.Module) -> None:
        super().__init__()
        # what transformers' attention functions look at
        self.config, self.layer_idx, self.is_causal = attention.config, attention.layer_idx, True
        self.num_key_value_groups, self.scaling = attention.num_key_value_groups, attention.scaling
        self.head_dim = attention.head_dim
        self.window = {"sliding_window": attention.sliding_window} if hasattr(attention, "sliding_window") else {}
        self.heads = attention.q_proj.out_features // self.head_dim
        self.key_heads = attention.k_proj.out_features // self.head_dim
        self.q_norm: Any = getattr(attention, "q_norm", None)
        self.k_norm: Any = getattr(attention, "k_norm", None)
        self.qkv, self.o_proj = qkv, output

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Give what transformers' module does: [B, q, width] to [B, q, width], and attention's weights if any.

        The cache is `past_key_values` to the layers of transformers 5.23, and `cache` to those of 5.24.
        """
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        shape = hidden_states.shape[:-1]
        heads = self.qkv(hidden_states).view(*shape, -1, self.head_dim)  # [B, q, H + 2K, D]
        query, key, value = heads.split([self.heads, self.key_heads, self.key_heads], 2)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        cos, sin = (one.unsqueeze(2) for one in position_embeddings)  # [B, q, 1, D]
        query, key = _rotated(query, cos, sin).transpose(1, 2), _rotated(key, cos, sin).transpose(1, 2)
        value = value.transpose(1, 2)
        kept = past_key_values if cache is None else cache
        if kept is not None:
            key, value = kept.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        attended, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **self.window, **others
        )
        return self.o_proj(attended.reshape(*shape, -1)), weights


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn [B, q, heads, D] by rotary angles [B, q, 1, D], of which either half is alike."""
    half = x.shape[-1] // 2
    first, second, out = x[..., :half], x[..., half:], torch.empty_like(x)
    torch.addcmul(first * cos[..., :half], second, sin[..., :half], value=-1, out=out[..., :half])
    torch.addcmul(second * cos[..., half:], first, sin[..., half:], out=out[..., half:])
    return out


def projections(attention: Any) -> list[nn.Linear]:
    """Give the projections to queries, keys and values of transformers' attention."""
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def joined(layers: list[nn.Linear]) -> nn.Linear:
    """Make one linear layer of several with one input, where their weights are."""
    first = layers[0]
    whole = nn.Linear(1, 1, bias=first.bias is not None, device="meta")
    whole.in_features, whole.out_features = first.in_features, sum(layer.out_features for layer in layers)
    whole.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    if first.bias is not None:
        whole.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    return whole


class JoinedLinear(nn.Module):  # type: ignore[misc]
    """Several linear layers of one input as one product; their outputs lie side by side.

    Weights and biases come one after the other, in any order, by the number of the layer.
    """

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.rows = [layer.out_features for layer in layers]
        first = layers[0]
        joined = nn.Linear(first.in_features, sum(self.rows), bias=first.bias is not None, device="meta")
        self.packed = PackedLinear(joined.to(first.weight.dtype))
        self._weights: dict[int, torch.Tensor] = {}
        if self.packed.bias is not None:
            bias = torch.empty(sum(self.rows), dtype=first.weight.dtype)
            self.packed.bias = nn.Parameter(bias, requires_grad=False)

    def lay_out(self, number: int, weight: torch.Tensor) -> None:
        """Take the weight of a layer, in the dtype that is computed in, in memory of its own."""
        self._weights[number] = weight
        if len(self._weights) == len(self.rows):
            self.packed.lay_out(torch.cat([self._weights.pop(at) for at in range(len(self.rows))]))

    def set_bias(self, number: int, bias: torch.Tensor) -> None:
        """Take the bias of a layer."""
        self.packed.bias.data.split(self.rows)[number].copy_(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, in_features] to […, Σ out_features]."""
        out: torch.Tensor = self.packed(x)
        return out
