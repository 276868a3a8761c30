"""Attention over prefix and suffix is attention over the joined sequence, with windows as without; all else is SDPA's."""

from __future__ import annotations

import pytest
import torch

from qvsplit.errors import ModelError
from qvsplit.kernels import prefix_products
from qvsplit.kernels import shared_prefix_attention as kernel
from qvsplit.models.prefix_cache import Prefix, SuffixCache

HEADS, KEY_HEADS, WIDTH = 6, 2, 8
CPU = torch.device("cpu")


class Layer(torch.nn.Module):
    layer_idx = 0
    num_key_value_groups = HEADS // KEY_HEADS


def prefix_of(length, window):
    """The whole beginning's keys and values, and the prefix that keeps those which its window lets anybody see."""
    keys, values = torch.randn(2, KEY_HEADS, length, WIDTH)
    kept = slice(max(0, length - window + 1), None)
    return keys, values, Prefix(tuple(range(length)), (keys[:, kept],), (values[:, kept],), length, {}, {0: window})


@pytest.mark.parametrize("window", [2, 5, 9, 16, 100])
@pytest.mark.parametrize("new", [1, 4, 7])
@pytest.mark.parametrize(("at_once", "least"), [(1, 1000), (1 << 20, 1000), (1, 1), (1 << 20, 1)])
def test_a_window_is_as_wide_as_in_the_joined_sequence_and_padding_does_not_count(
    monkeypatch, window, new, at_once, least
):
    monkeypatch.setattr(prefix_products, "SCORE_VALUES", at_once)
    monkeypatch.setattr(prefix_products, "LEAST_TOKENS", least)  # with and without products in oneDNN's layout
    torch.manual_seed(window)
    beginnings = [prefix_of(n, window) for n in (11, 3)]
    rows, padding, suffix = [beginnings[0], beginnings[0], beginnings[1]], [0, 2, 3], 7
    query = torch.randn(3, HEADS, new, WIDTH)
    key, value = torch.randn(2, 3, KEY_HEADS, suffix, WIDTH)
    cache = SuffixCache([prefix for _, _, prefix in rows], padding)
    cache.update(key[:, :, : suffix - new], value[:, :, : suffix - new], 0)
    with kernel.in_force(cache.step(new, CPU)):
        got, _ = kernel.attention(Layer(), query, key, value, None, scaling=0.3, sliding_window=window)
    assert bool(got.isfinite().all())
    for row, (keys, values, _) in enumerate(rows):
        pad, n = padding[row], keys.shape[1]
        joined = [torch.cat([a, b[row, :, pad:]], 1)[None] for a, b in ((keys, key), (values, value))]
        total = n + suffix - pad
        place = torch.arange(total)
        seen = (place <= place[:, None]) & (place > place[:, None] - window)
        real = max(0, new - (suffix - pad))  # of the new columns, those of padding come first
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[row : row + 1, :, real:], *joined, seen[total - new + real :], scale=0.3, enable_gqa=True
        )
        assert (got[row : row + 1, real:].transpose(1, 2) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("in_a_batch", [True, False])
@pytest.mark.parametrize("asked", [{"softcap": 30.0}, {"s_aux": torch.zeros(HEADS)}, {"position_bias": torch.zeros(1)}])
def test_what_it_does_not_compute_is_refused(in_a_batch, asked):
    query = torch.randn(1, HEADS, 3, WIDTH)
    key, value = torch.randn(2, 1, KEY_HEADS, 3, WIDTH)
    _, _, prefix = prefix_of(4, 100)
    step = SuffixCache([prefix], [0]).step(3, CPU) if in_a_batch else None
    with kernel.in_force(step), pytest.raises(ModelError, match=f"`{next(iter(asked))}`"):
        kernel.attention(Layer(), query, key, value, None, scaling=0.3, **asked)
    harmless = {"softcap": None, "sliding_window": 4, "position_ids": torch.zeros(1, 3), "dropout": 0.0}
    with kernel.in_force(step):
        kernel.attention(Layer(), query, key, value, None, scaling=0.3, **harmless)


def test_without_a_batch_masks_and_attention_are_transformers_own():
    from transformers import LlamaConfig
    from transformers.cache_utils import DynamicCache
    from transformers.masking_utils import create_sliding_window_causal_mask

    config = LlamaConfig(num_hidden_layers=1, sliding_window=3)
    hidden = torch.zeros(1, 6, 4)
    masks = []
    for attention in ("sdpa", kernel.ATTENTION):
        config._attn_implementation = attention
        masks.append(create_sliding_window_causal_mask(config, hidden, None, DynamicCache(config=config)))
    assert torch.equal(*masks)
    assert not bool(masks[0].all())
    _, _, prefix = prefix_of(4, 100)
    with kernel.in_force(SuffixCache([prefix], [0]).step(6, CPU)):
        assert create_sliding_window_causal_mask(config, hidden, None, DynamicCache(config=config)) is None
