"""The fused forward pass, held against transformers' own encoder."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from qvsplit.kernels import fused_encoder, packed_linear
from qvsplit.kernels.fused_encoder import fuse
from qvsplit.kernels.varlen_attention import Found

GRIDS = {
    "one": [(1, 6, 10)],
    "two of a size": [(1, 4, 4), (1, 4, 4)],
    "a size between others": [(1, 4, 6), (1, 8, 2), (1, 8, 2), (1, 4, 6), (1, 2, 2)],
    "equally many patches, other shapes": [(1, 4, 6), (1, 6, 4)],
    "a video": [(3, 4, 4), (1, 4, 4)],
}


def module(act: str = "quick_gelu", dtype: torch.dtype = torch.float32):
    config = Qwen2VisionTransformerPretrainedModel.config_class(
        depth=3, embed_dim=64, num_heads=2, hidden_size=48, mlp_ratio=4, hidden_act=act
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    encoder = Qwen2VisionTransformerPretrainedModel._from_config(config)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(0, 0.15)
    return encoder.to(dtype).eval().requires_grad_(False)


def pixels(grids, seed=1) -> torch.Tensor:
    count = sum(t * h * w for t, h, w in grids)
    return torch.randn(count, 3 * 14 * 14, generator=torch.Generator().manual_seed(seed))


def both(values: torch.Tensor) -> torch.Tensor:
    """The processor's layout, spelled out: channels, two temporal slices, pixels."""
    return torch.stack([values.view(len(values), 3, -1)] * 2, dim=2).flatten(1)


def reference(encoder, values, grids) -> torch.Tensor:
    with torch.inference_mode():
        return encoder(both(values).to(encoder.dtype), grid_thw=torch.tensor(grids)).pooler_output


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rows", [3, 512])
@pytest.mark.parametrize("name", GRIDS)
def test_it_gives_what_transformers_gives(monkeypatch, name, rows, packed):
    monkeypatch.setattr(fused_encoder, "ROWS_CPU", rows)
    if not packed:
        monkeypatch.setattr(fused_encoder, "can_pack", lambda dtype: False)
    elif not packed_linear.can_pack(torch.float32):
        pytest.skip("this torch has no oneDNN")
    expected = reference(module(), pixels(GRIDS[name]), GRIDS[name])
    fused = fuse(module())
    assert fused.packed is packed
    (got,) = fused(pixels(GRIDS[name]), GRIDS[name])
    assert float((got - expected).norm() / expected.norm()) < 1e-5
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def by_segments(q, k, v, ends, longest):
    """Stands in for a library's: attention within each sequence, one after the other."""
    assert longest == max(ends.diff().tolist())
    attend = torch.nn.functional.scaled_dot_product_attention
    parts = zip(*(one.split(ends.diff().tolist()) for one in (q, k, v)), strict=True)
    return torch.cat([attend(*(part.transpose(0, 1) for part in three)).transpose(0, 1) for three in parts])


@pytest.fixture
def with_varlen(monkeypatch):
    """A library that has attention over unequal lengths, on any device; gives how often it was called."""
    calls = []

    def varlen(*given):
        calls.append(len(given[3]) - 1)
        return by_segments(*given)

    monkeypatch.setattr(fused_encoder, "find_varlen", lambda *args, **more: Found("fake", varlen, {}))
    return calls


@pytest.mark.parametrize("name", GRIDS)
def test_one_attention_call_for_all_sizes_gives_what_transformers_gives(with_varlen, name):
    grids = GRIDS[name]
    (got,) = fuse(module(), attention="varlen")(pixels(grids), grids)
    torch.testing.assert_close(got, reference(module(), pixels(grids), grids), rtol=1e-4, atol=1e-4)
    assert with_varlen == [sum(t for t, _, _ in grids)] * 3


def test_many_small_sizes_share_a_call_and_few_or_large_ones_do_not(with_varlen, monkeypatch):
    monkeypatch.setattr(fused_encoder, "VARLEN_RUNS", 3)
    monkeypatch.setattr(fused_encoder, "VARLEN_PATCHES", 20)
    small, large, few, alike = ([(1, 2, 2), (1, 4, 4), (1, 2, 6)], [(1, 2, 2), (1, 4, 4), (1, 6, 12)],
                                [(1, 2, 2), (1, 4, 4)], [(1, 2, 2)] * 9)  # fmt: skip
    encoder = fuse(module())
    for grids, calls in ((small, [3] * 3), (large, []), (few, []), (alike, [])):
        with_varlen.clear()
        (got,) = encoder(pixels(grids), grids)
        torch.testing.assert_close(got, reference(module(), pixels(grids), grids), rtol=1e-4, atol=1e-4)
        assert with_varlen == calls
    assert fuse(module(), attention="sdpa")(pixels(small), small) is not None
    assert with_varlen == []


def test_on_a_cpu_sizes_have_calls_of_their_own(monkeypatch):
    monkeypatch.setattr(fused_encoder, "VARLEN_RUNS", 1)
    grids = GRIDS["a size between others"]
    torch.testing.assert_close(
        fuse(module())(pixels(grids), grids)[0], reference(module(), pixels(grids), grids), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(RuntimeError, match="no attention over unequal lengths: .*on CUDA, not torch.float32 on cpu"):
        fuse(module(), attention="varlen")(pixels(grids), grids)


def test_another_scale_of_scores_is_none_that_a_library_computes(with_varlen):
    plain = module()
    plain.blocks[0].attn.scaling = 0.5
    with pytest.raises(RuntimeError, match="scores are scaled by 0.5"):
        fuse(plain, attention="varlen")(pixels([(1, 2, 2)]), [(1, 2, 2)])
    assert with_varlen == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_cuda_one_attention_call_is_as_near_the_truth_as_transformers(dtype):
    grids = [(1, 2 * n, 4) for n in range(1, 13)]
    truth = reference(module(dtype=dtype).float(), pixels(grids).to(dtype).float(), grids)
    theirs = reference(module(dtype=dtype), pixels(grids), grids).float()
    for attention in ("varlen", "auto"):
        mine = fuse(module(dtype=dtype).cuda(), attention=attention)(pixels(grids).to("cuda", dtype), grids)[0]
        assert float((mine.float().cpu() - truth).norm()) < 1.5 * float((theirs - truth).norm())


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "silu"])
def test_other_activations_stay_what_they_are(act):
    grids = GRIDS["one"]
    torch.testing.assert_close(
        fuse(module(act))(pixels(grids), grids)[0],
        reference(module(act), pixels(grids), grids),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_the_truth_than_transformers_is(dtype):
    """In few bits both round: held against float32, on the same rounded weights, as both are."""
    grids = GRIDS["a size between others"]
    exact = module(dtype=dtype).float()
    truth = reference(exact, pixels(grids).to(dtype).float(), grids)
    theirs = reference(module(dtype=dtype), pixels(grids), grids).float()
    mine = fuse(module(dtype=dtype))(pixels(grids).to(dtype), grids)[0].float()
    assert float((mine - truth).norm()) < 1.5 * float((theirs - truth).norm())


def test_plain_weights_are_not_kept_beside_packed_ones():
    plain = module()
    fuse(plain)
    assert all(block.mlp.fc1 is None and block.attn.qkv is None for block in plain.blocks)


class Cancelled(Exception):
    pass


def test_it_ends_between_layers_when_told_to():
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        fuse(module(), check=check)(pixels([(1, 2, 2)]), [(1, 2, 2)])
    assert len(calls) == 2


def test_frames_of_one_size_beside_one_another_share_an_attention_call():
    heads = torch.arange(3 * 2 * 36 * 4).view(3, 2, 36, 4)
    runs = fused_encoder._runs_of_one_size(heads, [(2, 2, 2), (1, 4, 1), (1, 2, 4), (1, 4, 4)])
    assert [(part.shape[2], number) for part, number in runs] == [(12, 3), (8, 1), (16, 1)]
    assert torch.equal(torch.cat([part for part, _ in runs], 2), heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quick_gelu_is_transformers_own_to_the_bit(dtype):
    from transformers.activations import QuickGELUActivation

    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(fused_encoder.quick_gelu(x), QuickGELUActivation()(x))
