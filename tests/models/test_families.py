"""Of every family, the encoder alone: loaded strictly, from its own bytes, with the full model's features to the bit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qvsplit.checkpoints import opening
from qvsplit.checkpoints.fingerprint import encoder_fingerprint
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.errors import WeightsError
from qvsplit.models.encoder import EncoderSpec, load_encoder
from qvsplit.weights import load_encoder_weights, load_language_model
from tests.support.families import FAMILIES, make_checkpoint
from tests.support.photographs import photographs

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """A photograph that families with tiles cut up."""
    (path,) = (path for path in photographs() if path.name == "chelsea.png")
    return Image.open(path).convert("RGB").resize((300, 200))


@pytest.fixture
def own(family_checkpoint, tmp_path):
    return lambda name: Path(shutil.copytree(family_checkpoint(name), tmp_path / name))


def alone(folder: Path):
    return load_encoder_weights(open_checkpoint(folder, "encoder"), device=CPU, dtype=torch.float32)


def bytes_read(monkeypatch) -> list[int]:
    read: list[int] = []
    real = os.preadv

    def counted(*args):
        read.append(real(*args))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    return read


# ---------------------------------------------------------------------------------------------------------- features


def rows_of(field) -> torch.Tensor:
    """What a field of the model's output holds for one image, as rows."""
    tensors = [field] if isinstance(field, torch.Tensor) else field
    return torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors])


def assert_the_full_models_features(folder: Path, reference, image: Image.Image) -> None:
    expected = reference.features(image)
    fields = {"pooler_output": expected.pooler_output}
    fields |= {
        f"deepstack_features_{n}": one for n, one in enumerate(getattr(expected, "deepstack_features", None) or ())
    }

    encoder = load_encoder(EncoderSpec(open_checkpoint(folder, "encoder"), "cpu", "float32", kernels="reference"))
    prepared = encoder.preparer.prepare(np.array(image))
    (encoded,) = encoder.encode([prepared])
    assert [*encoded.tensors] == [*fields] == [one.key for one in encoder.tensors]
    for tensor in encoder.tensors:
        field, rows = fields[tensor.key], encoded.tensors[tensor.key]
        assert torch.equal(rows, rows_of(field))
        assert rows.shape == (prepared.n_tokens, tensor.width)
        assert (tensor.container == "tensor") == isinstance(field, torch.Tensor)
        pieces = [field] if isinstance(field, torch.Tensor) else field
        if len(pieces) == 1:  # else the model itself joins them
            assert encoded.shapes.get(tensor.key, rows.shape) == pieces[0].shape
    inputs = reference.inputs([image], "")
    assert prepared.n_tokens == int((inputs["input_ids"] == reference.model.config.image_token_id).sum())
    assert prepared.grid_thw == (tuple(inputs["image_grid_thw"][0].tolist()) if "image_grid_thw" in inputs else None)


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_the_full_models_own_to_the_bit(name, image, family_checkpoint, family_reference):
    assert_the_full_models_features(family_checkpoint(name), family_reference(name), image)
    levels = getattr(family_reference(name).features(image), "deepstack_features", None)
    assert (levels is not None) == (name in {"qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe"})


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl", "minicpmv4_6"])
def test_and_where_the_family_is_not_listed(name, image, family_checkpoint, family_reference, monkeypatch):
    monkeypatch.setattr(opening, "FAMILIES", {})
    assert open_checkpoint(family_checkpoint(name), "both").family.encoder_names is not None
    assert_the_full_models_features(family_checkpoint(name), family_reference(name), image)


# ----------------------------------------------------------------------------------------------------------- loading


def state_of(model) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those too that no checkpoint holds."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


@pytest.mark.parametrize("name", FAMILIES)
def test_each_half_is_loaded_from_its_own_files_and_bytes(name, tmp_path, family_reference, monkeypatch):
    make_checkpoint(name, tmp_path, files=8)
    checkpoint = open_checkpoint(tmp_path, "both")
    files = {half: set(checkpoint.file_names(half)) for half in ("encoder", "language")}
    encoders, languages = files["encoder"] - files["language"], files["language"] - files["encoder"]
    assert encoders and languages
    sizes = {place.name: place.size for place in checkpoint.places(checkpoint.encoder_names).values()}
    full = state_of(family_reference(name).model)

    for file in languages:
        (tmp_path / file).rename(tmp_path / f"{file}.away")
    read = bytes_read(monkeypatch)
    encoder = alone(tmp_path)
    assert sum(read) == encoder.bytes_read == sum(sizes.values())
    for file in languages:
        (tmp_path / f"{file}.away").rename(tmp_path / file)
    for file in encoders:
        (tmp_path / file).unlink()
    opened = open_checkpoint(tmp_path, "language")
    language = load_language_model(opened, dtype=torch.float32, kernels="reference")

    halves = state_of(encoder.model), state_of(language)
    for half in halves:
        assert half.keys() <= full.keys()
        assert all(not tensor.is_meta and torch.equal(tensor, full[key]) for key, tensor in half.items())
    assert halves[0].keys() | halves[1].keys() == full.keys() - {key for key in full if "audio_tower." in key}
    assert {key.rpartition(".")[2] for key in halves[0].keys() & halves[1].keys()} <= {"image_newline"}


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def some_tensors(folder: Path) -> tuple[str, str]:
    """A matrix of the encoder alone and one of the language model alone, by their names in the checkpoint."""
    checkpoint = open_checkpoint(folder, "both")
    is_matrix = {name: len(place.shape) >= 2 for name, place in checkpoint.places([*checkpoint.files]).items()}
    shared = set(checkpoint.encoder_names) & set(checkpoint.language_names)
    encoders, languages = (
        [name for name in sorted(names) if is_matrix[name] and name not in shared and ".mlp.experts." not in name]
        for names in (checkpoint.encoder_names, checkpoint.language_names)
    )
    return encoders[len(encoders) // 2], next(name for name in languages if ".layers.1." in name and "mtp." not in name)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_half_must_be_whole_and_only_that_half(name, own):
    folder = own(name)
    encoders, languages = some_tensors(folder)
    whole = load_file(folder / WEIGHTS)

    edit(folder, lambda tensors: tensors.pop(languages))
    alone(folder)
    with pytest.raises(WeightsError) as caught:
        load_language_model(open_checkpoint(folder, "language"), dtype=torch.float32)
    assert caught.value.missing and not caught.value.misshapen

    def lose(tensors):
        tensors[languages] = whole[languages]
        del tensors[encoders]

    edit(folder, lose)
    load_language_model(open_checkpoint(folder, "language"), dtype=torch.float32)
    with pytest.raises(WeightsError) as caught:
        alone(folder)
    (missing,) = caught.value.missing
    assert missing.endswith(encoders.rpartition(".")[2]) and not caught.value.unexpected

    def cut(tensors):
        tensors[encoders] = whole[encoders][:-1].clone()
        tensors[f"{encoders}_and_more"] = torch.zeros(2)

    edit(folder, cut)
    with pytest.raises(WeightsError) as caught:
        alone(folder)
    assert [*caught.value.misshapen] == [missing] and "instead of" in caught.value.misshapen[missing]
    (unexpected,) = caught.value.unexpected
    assert unexpected.endswith("_and_more") and not caught.value.missing


def test_a_loose_tensor_is_of_both_halves(own):
    folder = own("llava_onevision")
    edit(folder, lambda tensors: tensors.pop("image_newline"))
    with pytest.raises(WeightsError, match="image_newline"):
        alone(folder)
    with pytest.raises(WeightsError, match="image_newline"):
        load_language_model(open_checkpoint(folder, "language"), dtype=torch.float32)


# ------------------------------------------------------------------------------------------------------- fingerprint


def change_json(path: Path, change) -> None:
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fingerprint_is_of_the_encoder_and_of_nothing_else(name, own):
    folder = own(name)
    encoders, languages = some_tensors(folder)
    text = (folder / "config.json").read_text(), (folder / "processor_config.json").read_text()

    def fingerprint() -> str:
        return encoder_fingerprint(open_checkpoint(folder, "both"))

    first = fingerprint()
    assert first == alone(folder).fingerprint

    def section(config):
        return config.get("thinker_config", config)

    edit(folder, lambda tensors: tensors[languages].view(-1)[:1].add_(1))
    change_json(folder / "config.json", lambda config: section(config)["text_config"].update(rms_norm_eps=0.5))
    change_json(folder / "processor_config.json", lambda config: config.update(another_setting=1))
    assert fingerprint() == first

    change_json(folder / "config.json", lambda config: section(config)["vision_config"].update(patch_size=5))
    others = [fingerprint()]
    (folder / "config.json").write_text(text[0])
    change_json(folder / "processor_config.json", lambda config: config["image_processor"].update(rescale_factor=0.5))
    others.append(fingerprint())
    (folder / "processor_config.json").write_text(text[1])
    edit(folder, lambda tensors: tensors[encoders].view(-1)[-1:].add_(1))
    others.append(fingerprint())
    assert len({first, *others}) == 4
