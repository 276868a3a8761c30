"""The fused forward pass of every encoder that has one, held against transformers' own."""

from __future__ import annotations

import importlib

import pytest
import torch

from qvsplit.errors import ModelError
from qvsplit.kernels import encoder_parts, fused_encoder
from qvsplit.kernels.fused_encoder import fuse
from qvsplit.kernels.varlen_attention import Found

GRIDS = {
    "one": [(1, 6, 10)],
    "two of a size": [(1, 4, 4), (1, 4, 4)],
    "a size between others": [(1, 4, 6), (1, 8, 2), (1, 8, 2), (1, 4, 6), (1, 2, 2)],
    "equally many patches, other shapes": [(1, 4, 6), (1, 6, 4)],
    "a video": [(3, 4, 4), (1, 4, 4)],
    "one token": [(1, 2, 2)],
    "two videos of unequal frames": [(2, 6, 10), (3, 10, 6)],
}
WINDOWS = {  # of two by two tokens; the layer in the middle sees whole frames
    "depth": 3, "hidden_size": 64, "intermediate_size": 60, "num_heads": 2, "out_hidden_size": 48, "patch_size": 14,
    "window_size": 56, "fullatt_block_indexes": [1],
}  # fmt: skip
LEARNED = {  # positions of seven by seven, heads whose width is no multiple of 16
    "depth": 3, "hidden_size": 72, "intermediate_size": 60, "num_heads": 2, "out_hidden_size": 48, "patch_size": 14,
    "num_position_embeddings": 49,
}  # fmt: skip
LEVELS = {"deepstack_visual_indexes": [0, 1]}
ENCODERS = {
    "Qwen2-VL": (
        "qwen2_vl", "Qwen2VisionTransformerPretrainedModel",
        {"depth": 3, "embed_dim": 64, "num_heads": 2, "hidden_size": 48, "mlp_ratio": 4},
    ),
    "Qwen2.5-VL": ("qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", WINDOWS),
    "Qwen3-VL": ("qwen3_vl", "Qwen3VLVisionModel", LEARNED | LEVELS),
    "Qwen3.5": ("qwen3_5", "Qwen3_5VisionModel", LEARNED),
}  # fmt: skip
ALIKE = {  # other modules, of the same layers
    "Qwen2.5-Omni": ("qwen2_5_omni", "Qwen2_5OmniVisionEncoder", WINDOWS),
    "Qwen3-VL-MoE": ("qwen3_vl_moe", "Qwen3VLMoeVisionModel", LEARNED | LEVELS),
    "Qwen3-Omni": ("qwen3_omni_moe", "Qwen3OmniMoeVisionEncoder", LEARNED | LEVELS),
    "Qwen3.5-MoE": ("qwen3_5_moe", "Qwen3_5MoeVisionModel", LEARNED),
    "Qwen4": ("qwen4_exp", "Qwen4ExpVisionModel", LEARNED),
}  # fmt: skip


def module(name: str = "Qwen2-VL", dtype: torch.dtype = torch.float32, **more):
    model_type, class_name, fields = (ENCODERS | ALIKE)[name]
    cls = getattr(importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}"), class_name)
    config = cls.config_class(**fields | more)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    encoder = cls._from_config(config)
    with torch.no_grad():
        for part, parameter in encoder.named_parameters():
            is_scale = parameter.ndim == 1 and part.endswith("weight")  # of a norm: activations get values that matter
            parameter.normal_(1 if is_scale else 0, 0.15)
    return encoder.to(dtype).eval().requires_grad_(False)


def pixels(grids, *, still=True, seed=1) -> torch.Tensor:
    count = sum(t * h * w for t, h, w in grids)
    return torch.randn(count, (1 if still else 2) * 3 * 14 * 14, generator=torch.Generator().manual_seed(seed))


def both(values: torch.Tensor) -> torch.Tensor:
    """The processor's layout, spelled out: channels, two temporal slices, pixels."""
    return torch.stack([values.view(len(values), 3, -1)] * 2, dim=2).flatten(1)


def reference(encoder, values, grids, *, still=True) -> list[torch.Tensor]:
    with torch.inference_mode():
        full = both(values) if still else values
        output = encoder(full.to(encoder.dtype), grid_thw=torch.tensor(grids))
    return [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]


def assert_alike(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-5
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=["packed", "plain"])
def packed(request, monkeypatch) -> bool:
    """Whether oneDNN multiplies; without it the code is what a GPU runs."""
    if request.param == "plain":
        monkeypatch.setattr(fused_encoder, "can_pack", lambda dtype: False)
    elif not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    return request.param == "packed"


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("rows", [3, 512])
def test_it_gives_what_transformers_gives(monkeypatch, name, rows, packed):
    monkeypatch.setattr(fused_encoder, "ROWS_CPU", rows)
    truth, fused = module(name), fuse(module(name))
    assert fused.packed is packed
    for grids in GRIDS.values():
        for still in (True, False):
            values = pixels(grids, still=still)
            assert_alike(fused(values, grids, still=still), reference(truth, values, grids, still=still))


@pytest.mark.parametrize("name", ALIKE)
def test_encoders_of_other_names_and_the_same_layers_have_it_too(name):
    grids = GRIDS["a size between others"]
    assert_alike(fuse(module(name))(pixels(grids), grids), reference(module(name), pixels(grids), grids))


def test_every_class_that_is_named_is_tried_here():
    assert {class_name for _, class_name, _ in (ENCODERS | ALIKE).values()} == set(encoder_parts.CLASSES)


def test_levels_come_in_the_order_of_their_layers():
    grids, order = GRIDS["one"], {"deepstack_visual_indexes": [2, 0]}
    got = fuse(module("Qwen3-VL", **order))(pixels(grids), grids)
    assert_alike(got, reference(module("Qwen3-VL", **order), pixels(grids), grids))
    assert len(got) == 3


def test_an_encoder_that_has_none_is_named():
    with pytest.raises(ModelError, match="no fused kernels for Linear: use `kernels=reference`"):
        fuse(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ENCODERS)
def test_long_frames_are_multiplied_by_onednn(monkeypatch, name):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    calls, real = [], fused_encoder.attend_packed
    monkeypatch.setattr(fused_encoder, "attend_packed", lambda q, *rest: calls.append(q.shape[1]) or real(q, *rest))
    monkeypatch.setattr(fused_encoder, "LEAST", 24)
    grids = GRIDS["a size between others"] + GRIDS["one"] * 2 + GRIDS["a video"]
    assert_alike(fuse(module(name))(pixels(grids), grids), reference(module(name), pixels(grids), grids))
    assert calls == [24, 24, 60, 60] * (1 if name == "Qwen2.5-VL" else 3)  # windows of 16 patches are short
    calls.clear()
    fuse(module(name), attention="sdpa")(pixels(grids), grids)
    assert calls == []


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


@pytest.mark.parametrize("name", ["Qwen2-VL", "Qwen3-VL"])
def test_one_attention_call_for_all_sizes_gives_what_transformers_gives(with_varlen, name):
    encoder, truth = fuse(module(name), attention="varlen"), module(name)
    for grids in GRIDS.values():
        with_varlen.clear()
        assert_alike(encoder(pixels(grids), grids), reference(truth, pixels(grids), grids))
        assert with_varlen == [sum(t for t, _, _ in grids)] * 3


def test_windows_share_a_call_as_frames_do(with_varlen):
    grids = GRIDS["two videos of unequal frames"]
    got = fuse(module("Qwen2.5-VL"), attention="varlen")(pixels(grids), grids)
    assert_alike(got, reference(module("Qwen2.5-VL"), pixels(grids), grids))
    assert with_varlen == [5 * 6, 5, 5 * 6]


def test_many_small_sizes_share_a_call_and_few_or_large_ones_do_not(with_varlen, monkeypatch):
    monkeypatch.setattr(fused_encoder, "VARLEN_RUNS", 3)
    monkeypatch.setattr(fused_encoder, "VARLEN_PATCHES", 20)
    small, large, few, alike = ([(1, 2, 2), (1, 4, 4), (1, 2, 6)], [(1, 2, 2), (1, 4, 4), (1, 6, 12)],
                                [(1, 2, 2), (1, 4, 4)], [(1, 2, 2)] * 9)  # fmt: skip
    encoder, truth = fuse(module()), module()
    for grids, calls in ((small, [3] * 3), (large, []), (few, []), (alike, [])):
        with_varlen.clear()
        assert_alike(encoder(pixels(grids), grids), reference(truth, pixels(grids), grids))
        assert with_varlen == calls
    assert fuse(module(), attention="sdpa")(pixels(small), small) is not None
    assert with_varlen == []


def test_on_a_cpu_sizes_have_calls_of_their_own(monkeypatch):
    monkeypatch.setattr(fused_encoder, "VARLEN_RUNS", 1)
    grids = GRIDS["a size between others"]
    assert_alike(fuse(module())(pixels(grids), grids), reference(module(), pixels(grids), grids))
    with pytest.raises(RuntimeError, match="no attention over unequal lengths: .*on CUDA, not torch.float32 on cpu"):
        fuse(module(), attention="varlen")(pixels(grids), grids)


def test_another_scale_of_scores_is_none_that_a_library_computes(with_varlen):
    plain = module()
    plain.blocks[0].attn.scaling = 0.5
    with pytest.raises(RuntimeError, match="scores are scaled by 0.5"):
        fuse(plain, attention="varlen")(pixels([(1, 2, 2)]), [(1, 2, 2)])
    assert with_varlen == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_cuda_one_attention_call_is_as_near_the_truth_as_transformers(name, dtype):
    grids = [(1, 2 * n, 4) for n in range(1, 13)]
    truth = reference(module(name, dtype).float(), pixels(grids).to(dtype).float(), grids)
    theirs = reference(module(name, dtype), pixels(grids), grids)
    for attention in ("varlen", "auto"):
        mine = fuse(module(name, dtype).cuda(), attention=attention)(pixels(grids).to("cuda", dtype), grids)
        assert_no_further([one.cpu() for one in mine], theirs, truth)


def assert_no_further(mine: list[torch.Tensor], theirs: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
    for one, other, exact in zip(mine, theirs, truth, strict=True):
        assert float((one.float() - exact).norm()) < 1.5 * float((other.float() - exact).norm())


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "silu", "relu"])
@pytest.mark.parametrize("name", ENCODERS)
def test_other_activations_stay_what_they_are(name, act):
    grids = GRIDS["one"]
    got = fuse(module(name, hidden_act=act))(pixels(grids), grids)
    assert_alike(got, reference(module(name, hidden_act=act), pixels(grids), grids))


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_the_truth_than_transformers_is(name, dtype):
    """In few bits both round: held against float32, on the same rounded weights, as both are."""
    grids = GRIDS["a size between others"]
    truth = reference(module(name, dtype).float(), pixels(grids).to(dtype).float(), grids)
    theirs = reference(module(name, dtype), pixels(grids), grids)
    assert_no_further(fuse(module(name, dtype))(pixels(grids).to(dtype), grids), theirs, truth)


@pytest.mark.parametrize("name", ENCODERS | ALIKE)
def test_plain_weights_are_not_kept_beside_packed_ones(name):
    plain = module(name)
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    fuse(plain)
    assert all(parameter.ndim == 1 for parameter in plain.parameters())  # norms


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
    runs = fused_encoder._runs_of_one_size(heads, [4, 4, 4, 8, 16])
    assert [(part.shape[2], number) for part, number in runs] == [(12, 3), (8, 1), (16, 1)]
    assert torch.equal(torch.cat([part for part, _ in runs], 2), heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quick_gelu_is_transformers_own_to_the_bit(dtype):
    from transformers.activations import QuickGELUActivation

    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(fused_encoder.quick_gelu(x), QuickGELUActivation()(x))
