"""The tiny checkpoints of all families are what tests take them for: the hub's names, loaded whole, sensitive to pixels."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.support.families import FAMILIES, make_checkpoint
from tests.support.photographs import photographs

QUESTION = "What is in the picture?"
QWEN = ("visual.", "model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")
QWEN_3 = ("model.visual.", "model.language_model.", "lm_head.")
LLAVA = ("vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head.")
IDEFICS = ("model.vision_model.", "model.connector.", "model.text_model.", "lm_head.")
OMNI = ("thinker.visual.", "thinker.audio_tower.", "thinker.model.layers.", "thinker.model.embed_tokens.",
        "thinker.model.norm.", "thinker.lm_head.", "talker.")  # fmt: skip
# How the names of the hub's tensors begin: the encoder's first. Every name begins with one of these, each is there.
HUB = {
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN_3,
    "qwen3_vl_moe": QWEN_3,
    "qwen3_5": (*QWEN_3, "mtp."),
    "qwen3_5_moe": (*QWEN_3, "mtp."),
    "qwen4_exp": (*QWEN_3, "mtp."),
    "qwen2_5_omni": (*OMNI, "token2wav."),
    "qwen3_omni_moe": (*OMNI, "code2wav."),
    "glm4v": QWEN_3,
    "gemma3": LLAVA[:3],
    "paligemma": LLAVA[:3],
    "paligemma2": LLAVA[:3],
    "llava": LLAVA,
    "llava_onevision": (*LLAVA, "image_newline"),
    "internvl": ("vision_tower.encoder.layer.", "vision_tower.embeddings.", *LLAVA[1:]),
    "idefics3": IDEFICS,
    "smolvlm": IDEFICS,
    "mistral3": ("vision_tower.transformer.layers.", "vision_tower.ln_pre.", "vision_tower.patch_conv.", *LLAVA[1:]),
    "minicpmv4_6": ("model.vision_tower.", "model.merger.", "model.language_model.", "lm_head."),
    "lfm2_vl": ("model.vision_tower.vision_model.", "model.multi_modal_projector.", "model.language_model."),
}
# Experts as the hub has them: all of a layer in one tensor, that tensor transposed, or one by one.
EXPERTS = {
    "qwen3_vl_moe": {"experts.gate_up_proj": (4, 64, 48), "experts.down_proj": (4, 24, 64)},
    "qwen3_5_moe": {"experts.gate_up_proj": (4, 48, 64), "experts.down_proj": (4, 64, 24)},
    "qwen4_exp": {"experts.gate_up_proj": (4, 48, 64), "experts.down_proj": (4, 64, 24)},
    "qwen3_omni_moe": {
        f"experts.{expert}.{part}_proj.weight": (64, 24) if part == "down" else (24, 64)
        for expert in range(4)
        for part in ("gate", "up", "down")
    },
}


@pytest.fixture(scope="module")
def images():
    pictures = [Image.open(path).convert("RGB").resize((300, 200)) for path in photographs()[:3]]
    assert len({picture.tobytes() for picture in pictures}) == 3
    return pictures


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tiny_checkpoint_loads_whole_has_the_hubs_names_and_looks_at_the_image(
    name, images, family_checkpoint, family_reference
):
    tensors = load_file(family_checkpoint(name) / "model.safetensors")
    begins = {key: [start for start in HUB[name] if key.startswith(start)] for key in tensors}
    assert {key: starts for key, starts in begins.items() if len(starts) != 1} == {}
    assert {starts[0] for starts in begins.values()} == set(HUB[name])
    assert sum(file.stat().st_size for file in family_checkpoint(name).iterdir()) < 3e6

    reference = family_reference(name)
    assert {what: keys for what, keys in reference.loading.items() if keys} == {}
    answers = [reference.answer([image], QUESTION) for image in images]
    assert len({tuple(answer) for answer in answers}) >= 2
    first, *others = [reference.logits([image], QUESTION) for image in images]
    assert all((first - other).abs().max() > 0.1 * first.std() for other in others)
    assert not torch.equal(first, reference.logits(images[:1], "Is it day or night?"))
    features = [torch.cat([*reference.features(image).pooler_output]) for image in images[:2]]
    assert 4 <= len(features[0].flatten(0, -2)) <= 80
    assert not torch.equal(*features)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_stored_as_the_hub_stores_them(name, family_checkpoint):
    tensors = load_file(family_checkpoint(name) / "model.safetensors")
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert {key.split(".0.mlp.")[1]: shape for key, shape in shapes.items() if ".layers.0.mlp.experts." in key} == EXPERTS[name]  # fmt: skip


def test_files_seed_and_dtype_are_as_asked_for(tmp_path):
    for name, options in {"one": {}, "again": {"files": 3}, "other": {"seed": 1}, "half": {"dtype": "bfloat16"}}.items():  # fmt: skip
        make_checkpoint("qwen3_5", tmp_path / name, **options)
    one, other, half = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other", "half"))
    parts = sorted((tmp_path / "again").glob("*.safetensors"))
    again = {key: (file.name, tensor) for file in parts for key, tensor in load_file(file).items()}
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: file for key, (file, _) in again.items()}
    assert len(parts) == 3
    assert one.keys() == again.keys() == other.keys() == half.keys()
    assert all(torch.equal(one[key], again[key][1]) for key in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_omni_checkpoint_has_the_whole_models_config_and_the_thinkers_class_reads_its_part(
    family_checkpoint, family_reference
):
    folder = family_checkpoint("qwen2_5_omni")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "qwen2_5_omni"
    assert config["architectures"] == ["Qwen2_5OmniForConditionalGeneration"]
    assert {"thinker_config", "talker_config", "token2wav_config"} <= config.keys()
    model = family_reference("qwen2_5_omni").model
    assert model.config.model_type == "qwen2_5_omni_thinker"
    stored = load_file(folder / "model.safetensors")["thinker.visual.blocks.0.attn.q.weight"]
    assert torch.equal(model.model.visual.blocks[0].attn.q.weight, stored)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5", "glm4v"])
def test_thinking_is_switched_off_by_an_empty_block_behind_the_turn_mark(name, images, family_reference):
    reference = family_reference(name)
    decode = reference.processor.tokenizer.decode
    on, off = (decode(reference.inputs(images[:1], QUESTION, **how).input_ids[0]) for how in ({}, {"enable_thinking": False}))  # fmt: skip
    assert off.rsplit("assistant", 1)[1].rstrip().endswith("</think>")
    assert "</think>" not in on
