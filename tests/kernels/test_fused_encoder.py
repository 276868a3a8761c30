"""The fused forward pass, held against transformers' own encoder."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from qvsplit.kernels import fused_encoder, packed_linear
from qvsplit.kernels.fused_encoder import FusedEncoder

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
    fused = FusedEncoder(module())
    assert fused.packed is packed
    got = fused(pixels(GRIDS[name]), GRIDS[name])
    assert float((got - expected).norm() / expected.norm()) < 1e-5
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "silu"])
def test_other_activations_stay_what_they_are(act):
    grids = GRIDS["one"]
    torch.testing.assert_close(
        FusedEncoder(module(act))(pixels(grids), grids),
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
    mine = FusedEncoder(module(dtype=dtype))(pixels(grids).to(dtype), grids).float()
    assert float((mine - truth).norm()) < 1.5 * float((theirs - truth).norm())


def test_plain_weights_are_not_kept_beside_packed_ones():
    plain = module()
    FusedEncoder(plain)
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
        FusedEncoder(module(), check=check)(pixels([(1, 2, 2)]), [(1, 2, 2)])
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
