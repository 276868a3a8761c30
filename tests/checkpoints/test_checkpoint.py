"""A checkpoint's folder: which file holds what, and every way a folder can be wrong."""

from __future__ import annotations

import json
import pickle
import struct

import pytest
import torch

from qvsplit.checkpoints.families import QWEN2_VL
from qvsplit.checkpoints.opening import DEMO_FOLDER, choose_checkpoint, open_checkpoint, read_settings
from qvsplit.errors import ModelError
from tests.support.checkpoints import edit, files_of, make_tiny, rewrite


def test_the_halves_are_all_there_is_and_share_nothing(checkpoint):
    opened = open_checkpoint(checkpoint, "both")
    encoder, language = opened.tensor_names("encoder"), opened.tensor_names("language")
    assert sorted([*encoder, *language]) == sorted(opened.tensor_names("both")) == sorted(opened.files)
    assert all(name.startswith("visual.") for name in encoder)
    assert encoder
    assert language
    assert set(opened.file_names("encoder")) | set(opened.file_names("language")) == set(opened.file_names("both"))
    assert all(opened.has(half) for half in ("encoder", "language", "both"))
    assert (opened.name, opened.revision) == (str(checkpoint), None)


def test_a_checkpoint_can_be_sent_to_another_process(checkpoint):
    opened = open_checkpoint(checkpoint, "both")
    assert pickle.loads(pickle.dumps(opened)) == opened


@pytest.mark.parametrize("prefix", ["hub", "nested", "mixed"])
def test_the_encoders_names_are_the_same_under_every_prefix(own, checkpoint, prefix):
    expected = {QWEN2_VL.bare_name(name) for name in open_checkpoint(checkpoint, "encoder").encoder_places()}
    rewrite(own, files=3, prefix=prefix)
    places = open_checkpoint(own, "encoder").encoder_places()
    assert {QWEN2_VL.bare_name(name) for name in places} == expected
    assert all(name.startswith(("blocks.", "merger.", "patch_embed.")) for name in expected)


def test_a_half_that_is_not_on_this_disk(tmp_path):
    make_tiny(tmp_path / "model", files=7)
    opened = open_checkpoint(tmp_path / "model", "both")
    for name in set(opened.file_names("encoder")) - set(opened.file_names("language")):
        (tmp_path / "model" / name).unlink()
    opened = open_checkpoint(tmp_path / "model", "language")
    assert (opened.has("language"), opened.has("encoder"), opened.has("both")) == (True, False, False)
    with pytest.raises(ModelError, match="lacks .* which model.safetensors.index.json names"):
        open_checkpoint(tmp_path / "model", "encoder")


def test_the_dtype_is_that_of_most_bytes(own):
    def change(tensors):
        for name in tensors:
            wide = name == "visual.merger.ln_q.bias"
            tensors[name] = tensors[name].to(
                torch.float64 if wide else torch.bfloat16 if "visual" in name else torch.float16
            )

    edit(own, change)
    opened = open_checkpoint(own, "both")
    assert (opened.stored_dtype("encoder"), opened.stored_dtype("language")) == ("bfloat16", "float16")


def test_a_dtype_that_nothing_is_computed_in(own):
    edit(own, lambda tensors: tensors.update({n: t.to(torch.int8) for n, t in tensors.items()}))
    with pytest.raises(ModelError, match="vision encoder itself is quantised .* in I8"):
        open_checkpoint(own, "both").stored_dtype("encoder")


def test_an_empty_half_is_named(own):
    def change(tensors):
        for name in [n for n in tensors if n.startswith("visual.")]:
            del tensors[name]

    edit(own, change)
    opened = open_checkpoint(own, "language")
    with pytest.raises(ModelError, match="holds no vision encoder"):
        opened.encoder_places()
    with pytest.raises(ModelError, match="holds no vision encoder"):
        opened.stored_dtype("encoder")


def test_two_encoders_are_refused(own):
    def double(tensors):
        for name in [n for n in tensors if n.startswith("visual.")]:
            tensors["model." + name] = tensors[name].clone()

    edit(own, double)
    with pytest.raises(ModelError, match="two vision encoders"):
        open_checkpoint(own, "encoder").encoder_places()


def test_an_index_that_names_a_tensor_which_is_not_there(own):
    index = json.loads((own / "model.safetensors.index.json").read_text())
    index["weight_map"]["visual.extra"] = next(iter(index["weight_map"].values()))
    (own / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ModelError, match="has no tensor visual.extra, which model.safetensors.index.json says it holds"
    ):
        open_checkpoint(own, "encoder").encoder_places()


@pytest.mark.parametrize("layout", ["today", "hub"])
def test_the_processors_settings_come_from_either_layout(tmp_path, layout):
    make_tiny(tmp_path / "model", layout=layout)
    opened = open_checkpoint(tmp_path / "model", "encoder")
    assert opened.processor_config["patch_size"] == 14
    assert opened.vision_config["patch_size"] == 14
    assert opened.pixel_limits == (56 * 56, 12845056)


def test_settings_need_no_weights(own):
    for file in own.glob("*safetensors*"):
        file.unlink()
    settings = read_settings(str(own))
    assert (settings.files, settings.family, settings.name) == ({}, QWEN2_VL, str(own))
    with pytest.raises(ModelError, match="no model folder at ./nowhere"):
        read_settings("./nowhere")


def test_the_demo_and_a_folder_of_its_name(tmp_path, monkeypatch, checkpoint):
    (tmp_path / "demo").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("demo", "both").folder == read_settings("demo").folder == DEMO_FOLDER
    assert open_checkpoint("demo", "both").name == "demo"
    assert open_checkpoint("./demo", "both").folder == checkpoint.resolve()


def test_which_model_is_taken(checkpoint, monkeypatch):
    """The one asked for; a store's own; the environment's."""
    other = str(DEMO_FOLDER)
    assert choose_checkpoint(other, "encoder", own=str(checkpoint), revision=None).folder == DEMO_FOLDER
    assert choose_checkpoint(None, "encoder", own=str(checkpoint), revision=None).folder == checkpoint.resolve()
    monkeypatch.setenv("QVSPLIT_MODEL", other)
    assert choose_checkpoint(None, "encoder", own="", revision=None).folder == DEMO_FOLDER
    with pytest.raises(ModelError, match="the store was made with ./nowhere: .*name it as `model`"):
        choose_checkpoint(None, "encoder", own="./nowhere", revision=None)


# ------------------------------------------------------------------------------------------------- broken folders


def test_no_config(own):
    (own / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        open_checkpoint(own, "encoder")


def test_unreadable_config(own):
    (own / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        open_checkpoint(own, "encoder")


def test_unknown_architecture(own):
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(
        ModelError, match="'llama' model, for which transformers .* has no class that answers about images"
    ):
        open_checkpoint(own, "encoder")


def test_no_index(own):
    (own / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors\.index\.json"):
        open_checkpoint(own, "encoder")


def test_an_index_that_leads_out_of_the_folder(own):
    index = json.loads((own / "model.safetensors.index.json").read_text())
    index["weight_map"]["visual.merger.ln_q.bias"] = "../elsewhere.safetensors"
    (own / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="weight_map"):
        open_checkpoint(own, "encoder")


def test_a_missing_file_is_named(own):
    lost = open_checkpoint(own, "encoder").file_names("encoder")[-1]
    (own / lost).unlink()
    with pytest.raises(ModelError, match=lost):
        open_checkpoint(own, "encoder")


def test_a_truncated_file_is_named(own):
    name = open_checkpoint(own, "encoder").file_names("encoder")[0]
    data = (own / name).read_bytes()
    (own / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=f"{name} is damaged or cut short"):
        open_checkpoint(own, "encoder").encoder_places()


def test_a_header_that_claims_too_much(own):
    name = open_checkpoint(own, "encoder").file_names("encoder")[0]
    data = (own / name).read_bytes()
    (own / name).write_bytes(struct.pack("<Q", 1 << 62) + data[8:])
    with pytest.raises(ModelError, match="damaged"):
        open_checkpoint(own, "encoder").encoder_places()


def test_pickled_weights_are_refused_with_a_sentence(own):
    for file in files_of(own):
        file.unlink()
    (own / "model.safetensors.index.json").unlink()
    (own / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(ModelError, match="pickled weights"):
        open_checkpoint(own, "encoder")


def test_a_path_that_is_not_there():
    with pytest.raises(ModelError, match="no model folder at ./nowhere"):
        open_checkpoint("./nowhere", "encoder")
