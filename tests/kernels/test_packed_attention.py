"""Attention by oneDNN's products, held against torch's own."""

from __future__ import annotations

import pytest
import torch

from qvsplit.kernels import packed_attention
from qvsplit.kernels.packed_attention import attend_packed, can_attend_packed


@pytest.fixture
def anew():
    """The trial is made again, and forgotten afterwards."""
    can_attend_packed.cache_clear()
    yield
    can_attend_packed.cache_clear()


@pytest.mark.parametrize("head_dim", [64, 72, 80])
@pytest.mark.parametrize(("n", "rows"), [(1, 8), (16, 8), (17, 8), (100, 8), (100, 64)])
def test_it_is_torchs_own(monkeypatch, n, rows, head_dim):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(packed_attention, "ROWS", rows)
    # laid out as the encoder has them: one part of a longer batch
    q, k, v = torch.randn(3, 2, n + 5, head_dim, generator=torch.Generator().manual_seed(0))[:, :, 3 : n + 3]
    expected = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], scale=0.3)[0]
    got = attend_packed(q, k, v, 0.3)
    assert got.shape == (n, 2, head_dim)
    torch.testing.assert_close(got, expected.transpose(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", [lambda x, weight: x @ weight.T * 1.01, lambda x, weight: x.no_such_operator])
def test_operators_that_are_wrong_or_gone_are_not_used(monkeypatch, anew, wrong):
    monkeypatch.setattr(packed_attention, "_product", wrong)
    assert not can_attend_packed()


def test_without_onednn_it_is_not_used(monkeypatch, anew):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not can_attend_packed()
