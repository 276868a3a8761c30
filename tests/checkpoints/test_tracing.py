"""The dry run: what it finds of listed families, what it makes of others, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qvsplit.checkpoints import hf, opening, tracing
from qvsplit.checkpoints.files import tensor_files
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.errors import ModelError
from qvsplit.models.preparing import load_preparer
from qvsplit.models.prompt import Prompter
from tests.support.families import FAMILIES

UNLISTED = ("llava_onevision", "qwen3_vl", "minicpmv4_6")
FAMILY = dict(opening.FAMILIES)


@pytest.fixture
def own(family_checkpoint, tmp_path):
    """A copy of a family's checkpoint that a test may change."""
    return lambda name: Path(shutil.copytree(family_checkpoint(name), tmp_path / name))


@pytest.fixture
def unlisted(monkeypatch):
    """Have these families be unknown, and count how often a checkpoint is traced."""
    known = {name: family for name, family in FAMILY.items() if name not in UNLISTED}
    monkeypatch.setattr(opening, "FAMILIES", known)
    traced = []
    real = tracing.encoder_parts
    monkeypatch.setattr(tracing, "encoder_parts", lambda checkpoint: traced.append(checkpoint.name) or real(checkpoint))
    return traced


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_data_of_a_listed_family_is_what_a_dry_run_finds(name, family_checkpoint):
    checkpoint = open_checkpoint(family_checkpoint(name), "both")
    listed, traced = checkpoint.family, tracing.traced_family(checkpoint)
    assert listed.encoder_names is None and traced.encoder_names is not None
    assert (traced.encoder_modules, traced.loose_tensors) == (listed.encoder_modules, listed.loose_tensors)
    encoder = [tensor for tensor in checkpoint.files if listed.is_encoders(tensor)]
    assert encoder == [tensor for tensor in checkpoint.files if traced.is_encoders(tensor)]
    assert len(encoder) >= 10
    # a dry run does not know what of a checkpoint is of neither half
    neither = [
        tensor
        for tensor in checkpoint.files
        if not listed.is_encoders(tensor) and not listed.is_language_models(tensor)
    ]
    assert bool(neither) == bool(listed.ignored)
    languages = [tensor for tensor in checkpoint.files if traced.is_language_models(tensor) and tensor not in neither]
    assert languages == [tensor for tensor in checkpoint.files if listed.is_language_models(tensor)]
    both = set(encoder) & set(languages)
    assert both == ({"image_newline"} if name == "llava_onevision" else set())
    assert set(encoder) | set(languages) | set(neither) == set(checkpoint.files)


@pytest.mark.parametrize("name", UNLISTED)
def test_an_unlisted_family_is_traced_once_and_remembered(name, own, unlisted, family_checkpoint):
    listed = open_checkpoint(family_checkpoint("qwen2_vl"), "both")
    assert listed.family.encoder_names is None and unlisted == []
    folder = own(name)
    first = open_checkpoint(folder, "both")
    assert first.family.encoder_names == set(first.encoder_names) < set(first.files)
    assert first.encoder_names == [tensor for tensor in first.files if FAMILY[name].is_encoders(tensor)]
    assert len(unlisted) == 1
    assert open_checkpoint(folder, "encoder").family == first.family
    assert len(unlisted) == 1
    change_config(folder, initializer_range=0.5)
    assert open_checkpoint(folder, "both").family == first.family
    assert len(unlisted) == 2


def test_a_damaged_memory_is_traced_over(own, unlisted, tmp_path, monkeypatch):
    monkeypatch.setenv("QVSPLIT_CACHE", str(tmp_path / "cache"))
    folder = own("minicpmv4_6")
    first = open_checkpoint(folder, "both")
    (entry,) = (tmp_path / "cache" / "splits").iterdir()
    for times, damage in enumerate(("", "[]", '{"modules": 1, "loose": [], "names": []}'), 2):
        entry.write_text(damage)
        assert open_checkpoint(folder, "both").family == first.family
        assert len(unlisted) == times
        assert open_checkpoint(folder, "both").family == first.family  # and it is whole again
        assert len(unlisted) == times


def test_without_a_place_to_remember_it_in_every_opening_traces(own, unlisted, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QVSPLIT_CACHE", str(tmp_path / "file"))
    folder = own("minicpmv4_6")
    assert open_checkpoint(folder, "both").family == open_checkpoint(folder, "both").family
    assert len(unlisted) == 2


@pytest.mark.parametrize("name", ["llava_onevision", "gemma3"])
def test_tracing_needs_no_weights(name, own, tmp_path, monkeypatch):
    folder = own(name)
    expected = set(open_checkpoint(folder, "both").encoder_names)
    index = {"weight_map": dict.fromkeys(tensor_files(folder), "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(opening, "FAMILIES", {})
    with pytest.raises(ModelError, match="lacks model-00001"):  # of which the encoder's tensors are known by now
        open_checkpoint(folder, "encoder")
    assert opening._from_folder(folder, name=name, revision=None).family.encoder_names == expected
    assert opening.read_settings(str(folder)).family.encoder_modules == FAMILY[name].encoder_modules


# -------------------------------------------------------------------------------------------------- what is refused


def t5(model_type):
    text = {"model_type": "t5", "num_layers": 1, "d_model": 16, "d_ff": 16, "num_heads": 2, "d_kv": 8, "vocab_size": 9}
    return {"model_type": model_type, "text_config": text}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "nobody_knows_it"}, r"'nobody_knows_it' model, for which transformers .* has no class"),
        ({"model_type": "git"}, r"'git' model, which cannot be split: GitForCausalLM .* has no get_image_features"),
        (
            {"model_type": "kosmos-2"},
            "which cannot be split: Kosmos2ForConditionalGeneration .* takes no mm_encoder_outputs",
        ),
        (
            {"model_type": "florence2"},
            "which cannot be split: Florence2ForConditionalGeneration .* takes no mm_encoder_outputs",
        ),
        (t5("blip-2"), "cannot be split: it is an encoder-decoder"),
        (t5("instructblip"), "cannot be split: it is an encoder-decoder"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused_with_the_part_that_is_missing(config, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    index = {"weight_map": {"a.weight": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=said) as caught:
        open_checkpoint(tmp_path, "both")
    line = str(caught.value)
    assert str(tmp_path) in line and "name another checkpoint as `model`" in line
    assert "\n" not in line and len(line) < 300


@pytest.mark.parametrize("named", [{}, {"image_token_id": 10**6}], ids=["none", "unknown"])
def test_a_checkpoint_that_names_no_image_token_is_refused(named, own):
    folder = own("qwen3_vl")
    config = json.loads((folder / "config.json").read_text())
    config.pop("image_token_id")
    (folder / "config.json").write_text(json.dumps(config | named))
    checkpoint = open_checkpoint(folder, "both")
    with pytest.raises(ModelError, match="names no image token that its tokenizer has"):
        Prompter(checkpoint)
    with pytest.raises(ModelError, match="names no image token that its tokenizer has"):
        load_preparer(checkpoint, hf.load_config(checkpoint), min_pixels=None, max_pixels=None)
