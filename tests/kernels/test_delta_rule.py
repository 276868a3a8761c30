"""One token of a gated delta net is transformers' own, and only steps of shared prefixes change states in place."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5

from qvsplit.kernels import delta_rule
from qvsplit.kernels.shared_prefix_attention import Step, in_force


def theirs():
    rule = getattr(modeling_qwen3_5, delta_rule.NAME)
    return getattr(rule, "instead_of", rule)


def given(key_heads, dtype=torch.float32):
    torch.manual_seed(key_heads)
    rows, heads, width, values = 3, 4, 8, 6
    query, key = torch.randn(2, rows, 1, key_heads, width).to(dtype)
    value, beta = torch.randn(rows, 1, heads, values).to(dtype), torch.rand(rows, 1, heads).to(dtype)
    return query, key, value, -torch.rand(rows, 1, heads), beta, torch.randn(rows, heads, width, values)


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_a_step_is_transformers_own(key_heads, dtype, close):
    query, key, value, decay, beta, state = given(key_heads, dtype)
    expected, after = theirs()(
        query, key, value, g=decay, beta=beta, initial_state=state.clone(), output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    got = delta_rule.delta_step(query, key, value, decay, beta, state)
    assert got.dtype == dtype
    assert (got.float() - expected.float()).abs().max() < close
    assert (state - after).abs().max() < 1e-5


def test_it_is_taken_in_a_step_of_shared_prefixes_alone(monkeypatch):
    monkeypatch.setattr(modeling_qwen3_5, delta_rule.NAME, theirs())
    config = modeling_qwen3_5.Qwen3_5TextConfig(hidden_size=8, num_hidden_layers=1, layer_types=["linear_attention"])
    with torch.device("meta"):
        delta_rule.install(modeling_qwen3_5.Qwen3_5GatedDeltaNet(config, 0))
    rule = getattr(modeling_qwen3_5, delta_rule.NAME)
    query, key, value, decay, beta, state = given(4)
    named = {"g": decay, "beta": beta, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    before = state.clone()
    expected, after = rule(query, key, value, initial_state=state, **named)
    assert torch.equal(state, before)
    assert torch.equal(expected, theirs()(query, key, value, initial_state=state, **named)[0])
    with in_force(Step([])):
        got, kept = rule(query, key, value, initial_state=state, **named)
    assert kept is state
    assert (state - after).abs().max() < 1e-5
    assert (got - expected).abs().max() < 1e-5
