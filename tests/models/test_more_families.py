"""The less used families through the whole way: what is said of them is what a dry run finds, and answers are identical."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image

import qvsplit
from qvsplit.checkpoints import opening, tracing
from qvsplit.checkpoints.model_class import full_class, missing_part
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.errors import ModelError
from tests.support.every_model import further
from tests.support.families import ALL
from tests.support.families.more import MORE, VARIANTS
from tests.support.photographs import photographs

QUESTION = "Where is the cat? Tell me.\n\nNow"
REFUSED = {
    "llama4": "its get_image_features gives no pooler_output, only last_hidden_state",
    "granite4_vision": "its get_image_features gives no pooler_output, only hidden_states and deepstack_features",
    "ovis2": "its get_image_features gives visual_indicator_features beside pooler_output, which no store can hold",
    "idefics2": "Idefics2Processor gives no text that stands for an image",
}
MARKED = "hunyuan_vl"  # rows of features for the ends of an image's lines, too
SPLIT = [name for name in MORE if name not in {*REFUSED, MARKED}]
LISTED = [name for name in SPLIT if name not in VARIANTS]
TIMM = {"gemma3n", "perception_lm", "fast_vlm"}  # transformers has timm make their encoders
OWN_GENERATE: set[str] = set()
SHARED = {
    "llava_next": {"image_newline"},
    "deepseek_vl_hybrid": {"model.high_res_vision_alpha"},
    "gemma3n": {"model.embed_vision.embedding_projection.weight"},
}


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Photographs of which families with tiles cut one up."""
    found = {path.stem: path for path in photographs()}
    sizes = {"coffee": (300, 200), "chelsea": (140, 220)}
    return [Image.open(found[name]).convert("RGB").resize(size) for name, size in sizes.items()]


@pytest.fixture
def checkpoint_of(family_checkpoint):
    def made(name: str):
        if name in TIMM:
            pytest.importorskip("timm")
        return family_checkpoint(name)

    return made


def rows_of(tensors) -> torch.Tensor:
    tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
    return torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors])


@further
@pytest.mark.parametrize("name", SPLIT)
def test_features_prompts_and_answers_are_the_full_models_own(name, images, checkpoint_of, family_reference):
    folder = checkpoint_of(name)
    reference = family_reference(name)
    for parameter in reference.model.parameters():  # mapped from a file they may lie so that oneDNN rounds otherwise
        parameter.data = parameter.data.clone()
    with qvsplit.load_encoder(folder, device="cpu", dtype="float32") as encoder:
        features = encoder.encode(images)
    for image, one in zip(images, features, strict=True):
        assert torch.equal(one.flat_torch()["pooler_output"], rows_of(reference.features(image).pooler_output))

    options = qvsplit.AskOptions(device="cpu", dtype="float32", max_new_tokens=8)
    model = qvsplit.load_language_model(folder, options=options)
    thinks = {"enable_thinking": False} if "enable_thinking" in reference.processor.chat_template else {}
    for numbers in ([0], [1], [0, 1]) if name not in OWN_GENERATE else ():
        answer = model.answer([features[number] for number in numbers], QUESTION)
        shown = [images[number] for number in numbers]
        assert answer.tokens == reference.answer(shown, QUESTION, new_tokens=8, **thinks), numbers


@pytest.mark.parametrize("name", LISTED)
def test_the_data_of_a_listed_family_is_what_a_dry_run_finds(name, checkpoint_of, monkeypatch):
    listed = open_checkpoint(checkpoint_of(name), "both")
    assert listed.family.encoder_names is None
    parts = tracing.encoder_parts(listed)
    assert parts == ([*listed.family.encoder_modules], [*listed.family.loose_tensors])
    monkeypatch.setattr(opening, "FAMILIES", {})
    traced = open_checkpoint(checkpoint_of(name), "both")
    assert listed.encoder_names == traced.encoder_names
    neither = set(listed.files) - {*listed.encoder_names, *listed.language_names}
    assert set(traced.language_names) - neither == set(listed.language_names)
    assert set(listed.encoder_names) & set(listed.language_names) == SHARED.get(name, set())


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_is_refused_in_a_sentence(name, family_checkpoint):
    for half in ("encoder", "language"):
        with pytest.raises(ModelError) as refused:
            open_checkpoint(family_checkpoint(name), half)
        assert REFUSED[name] in str(refused.value) and "cannot be split" in str(refused.value)
        assert "\n" not in str(refused.value)


def test_tokens_that_a_grid_does_not_make_are_refused_too(family_checkpoint):
    with pytest.raises(ModelError, match=r"cannot be split: its image of a grid that makes \d+ tokens has \d+, which"):
        qvsplit.load_encoder(family_checkpoint(MARKED), device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("model_type", "missing"),
    [
        ("mllama", "has no get_image_features"),
        ("florence2", "takes no mm_encoder_outputs"),
        ("diffusion_gemma", "does not generate token by token"),
    ],
)
def test_a_class_that_cannot_be_split_is_refused_by_what_it_lacks(model_type, missing):
    with pytest.raises(ModelError, match=f"is a '{model_type}' model, which cannot be split: .* {missing}; name"):
        full_class(model_type, "here")


@pytest.mark.parametrize("model_type", ["chameleon", "dots3_note", "emu3", "janus", "got_ocr2"])
def test_the_method_may_be_of_what_is_inside_the_class(model_type):
    assert missing_part(full_class(model_type, "here")) is None


def test_an_output_that_a_model_reads_more_of_than_a_store_keeps_is_refused(family_checkpoint, monkeypatch, tmp_path):
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from transformers.models.llava.modeling_llava import LlavaModel

    @dataclass
    class WithMore(BaseModelOutputWithPooling):
        router_logits: Any = None

    features, forward = LlavaModel.get_image_features, LlavaModel.forward

    @functools.wraps(features)
    def giving(*args, **options):
        return WithMore(**features(*args, **options))

    def reading(self, *args, mm_encoder_outputs, **rest):
        return mm_encoder_outputs["image"].router_logits or forward(self, *args, **rest)

    monkeypatch.setattr(opening, "FAMILIES", {})
    monkeypatch.setattr(LlavaModel, "get_image_features", giving)
    assert open_checkpoint(family_checkpoint("llava"), "both")
    monkeypatch.setenv("QVSPLIT_CACHE", str(tmp_path))  # else the first is remembered
    monkeypatch.setattr(LlavaModel, "forward", reading)
    with pytest.raises(ModelError, match="cannot be split: .* has no attribute 'router_logits'"):
        open_checkpoint(family_checkpoint("llava"), "both")


def test_an_image_that_a_processor_refuses_is_a_bad_item(family_checkpoint, monkeypatch):
    monkeypatch.setattr(opening, "FAMILIES", {})  # else it is known which shapes it takes
    with (
        qvsplit.load_encoder(family_checkpoint("qwen2_5_vl"), device="cpu", dtype="float32") as encoder,
        pytest.raises(qvsplit.ItemError, match="processor refuses it: absolute aspect ratio must be smaller than 200"),
    ):
        encoder.encode([Image.new("RGB", (4000, 10))])


def test_every_family_is_tried():
    assert {*SPLIT, *REFUSED, MARKED} == set(MORE) <= set(ALL)
