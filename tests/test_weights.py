"""Selective loading: exactly one half, from every layout there is, or an error that names the tensors."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from conftest import QUESTIONS, WholeModel, upright_rgb
from make_checkpoint import make_tiny, rewrite
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qvsplit import weights
from qvsplit.album import open_album
from qvsplit.ask import Settings as AskSettings
from qvsplit.ask import open_asker
from qvsplit.checkpoint import open_checkpoint, read_header
from qvsplit.errors import ModelError, RecipeError, WeightsError
from qvsplit.extract import Settings, extract_pictures

CPU = torch.device("cpu")


@pytest.fixture
def own(checkpoint, tmp_path) -> Path:
    """A copy of the tiny checkpoint that a test may break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "own"))


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edit(folder: Path, change) -> None:
    """Apply `change` to every file's tensors, keeping the index true to what the files then hold."""
    weight_map = {}
    for file in files_of(folder):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load_vision(folder: Path):
    return weights.load_vision(open_checkpoint(folder, "vision"), device=CPU, dtype=torch.float32)


def load_language(folder: Path):
    return weights.load_language(open_checkpoint(folder, "language"), dtype=torch.float32)


@pytest.mark.parametrize("layout", ["today", "hub"])
@pytest.mark.parametrize("prefix", ["hub", "nested", "mixed"])
@pytest.mark.parametrize(("files", "tied"), [(1, False), (4, True)])
def test_both_halves_have_the_whole_models_weights(tmp_path, layout, prefix, files, tied):
    make_tiny(tmp_path / "model", layout=layout, prefix=prefix, files=files, tied=tied)
    expected = WholeModel(tmp_path / "model").model.state_dict()
    tower = {f"model.visual.{name}": t for name, t in load_vision(tmp_path / "model").module.state_dict().items()}
    language = load_language(tmp_path / "model").state_dict()
    assert tower.keys() | language.keys() == expected.keys()
    assert not tower.keys() & language.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in (tower | language).items())


def test_only_the_towers_bytes_are_read(own, monkeypatch):
    read: list[tuple[str, int]] = []
    real = os.preadv

    def counted(descriptor, buffers, offset):
        got = real(descriptor, buffers, offset)
        read.append((os.readlink(f"/proc/self/fd/{descriptor}"), got))
        return got

    monkeypatch.setattr(os, "preadv", counted)
    tower = load_vision(own)
    size = sum(place.size for place in weights.tower_places(open_checkpoint(own, "vision")).values())
    assert sum(got for _, got in read) == size == tower.bytes_read
    holding = {str(own / name) for name in open_checkpoint(own, "vision").file_names("vision")}
    assert {file for file, _ in read} == holding
    assert len(holding) < len(files_of(own))


def test_the_tower_has_real_rotary_buffers(own):
    buffers = dict(load_vision(own).module.named_buffers())
    assert buffers
    assert all(not b.is_meta and bool(torch.isfinite(b).all()) for b in buffers.values())


def test_a_dtype_is_cast_once(own):
    tower = load_vision(own).module.state_dict()
    cast = weights.load_vision(open_checkpoint(own, "vision"), device=CPU, dtype=torch.bfloat16)
    assert all(torch.equal(t.to(torch.bfloat16), cast.module.state_dict()[n]) for n, t in tower.items())
    assert cast.tower_bytes * 2 == sum(t.numel() * 4 for t in tower.values())


@pytest.mark.parametrize(
    ("lost", "load"),
    [("visual.blocks.1.mlp.fc1.bias", load_vision), ("model.layers.2.mlp.up_proj.weight", load_language),
     ("lm_head.weight", load_language), ("model.embed_tokens.weight", load_language)],
)  # fmt: skip
def test_a_missing_tensor_is_named_and_never_random(own, lost, load):
    edit(own, lambda tensors: tensors.pop(lost, None))
    with pytest.raises(WeightsError) as caught:
        load(own)
    assert [name for name in caught.value.missing if name.endswith(lost.split(".", 1)[1])]
    assert caught.value.unexpected == []


@pytest.mark.parametrize(
    ("extra", "load"), [("visual.blocks.9.norm1.weight", load_vision), ("model.extra.weight", load_language)]
)
def test_a_tensor_left_over_is_named(own, extra, load):
    def add(tensors):
        if "lm_head.weight" in tensors:
            tensors[extra] = torch.zeros(3)

    edit(own, add)
    with pytest.raises(WeightsError) as caught:
        load(own)
    assert any(name.endswith(extra.split(".", 1)[1]) for name in caught.value.unexpected)
    assert extra.split(".", 1)[1] in str(caught.value)


@pytest.mark.parametrize(
    ("name", "load"), [("visual.merger.mlp.0.weight", load_vision), ("lm_head.weight", load_language)]
)
def test_a_wrong_shape_is_named_with_both_shapes(own, name, load):
    def cut(tensors):
        if name in tensors:
            tensors[name] = tensors[name][:-4].clone()

    edit(own, cut)
    with pytest.raises(WeightsError) as caught:
        load(own)
    assert any(name.split(".", 1)[1] in key or name in key for key in caught.value.misshapen)
    assert "instead of" in str(caught.value)


def test_two_towers_are_refused(own):
    def double(tensors):
        for name in [n for n in tensors if n.startswith("visual.")]:
            tensors["model." + name] = tensors[name].clone()

    edit(own, double)
    with pytest.raises(ModelError, match="two vision towers"):
        load_vision(own)


def test_the_language_half_needs_no_file_of_the_tower_alone(tmp_path, photos, album_folder):
    """As after a download of that half only; and the tower needs none of the language's."""
    make_tiny(tmp_path / "model", files=7)
    whole = WholeModel(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model", "both")
    only_tower = set(checkpoint.file_names("vision")) - set(checkpoint.file_names("language"))
    only_language = set(checkpoint.file_names("language")) - set(checkpoint.file_names("vision"))
    assert only_tower
    assert only_language
    expected = load_vision(tmp_path / "model").fingerprint
    shutil.copytree(tmp_path / "model", tmp_path / "tower")
    for name in only_language:
        (tmp_path / "tower" / name).unlink()
    assert load_vision(tmp_path / "tower").fingerprint == expected
    for name in only_tower:
        (tmp_path / "model" / name).unlink()
    language = load_language(tmp_path / "model").state_dict()
    assert all(torch.equal(tensor, whole.model.state_dict()[name]) for name, tensor in language.items())


def test_device_map_is_handed_to_transformers(own):
    spread = {"model": "cpu", "lm_head": "meta"}
    model = weights.load_language(open_checkpoint(own, "language"), dtype=torch.bfloat16, device_map=spread)
    assert model.dtype == torch.bfloat16
    assert dict(model.hf_device_map) == spread


# ------------------------------------------------------------------------------------------------- broken folders


def test_no_config(own):
    (own / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        open_checkpoint(own, "vision")


def test_unreadable_config(own):
    (own / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        open_checkpoint(own, "vision")


def test_unknown_architecture(own):
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ModelError, match="'llama'.*qwen2_vl"):
        open_checkpoint(own, "vision")


def test_no_index(own):
    (own / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors\.index\.json"):
        open_checkpoint(own, "vision")


def test_an_index_that_leads_out_of_the_folder(own):
    index = json.loads((own / "model.safetensors.index.json").read_text())
    index["weight_map"]["visual.merger.ln_q.bias"] = "../elsewhere.safetensors"
    (own / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="weight_map"):
        open_checkpoint(own, "vision")


def test_a_missing_file_is_named(own):
    lost = open_checkpoint(own, "vision").file_names("vision")[-1]
    (own / lost).unlink()
    with pytest.raises(ModelError, match=lost):
        open_checkpoint(own, "vision")


def test_a_truncated_file_is_named(own):
    name = open_checkpoint(own, "vision").file_names("vision")[0]
    data = (own / name).read_bytes()
    (own / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=f"{name} is damaged or cut short"):
        load_vision(own)


def test_a_header_that_claims_too_much(own):
    name = open_checkpoint(own, "vision").file_names("vision")[0]
    data = (own / name).read_bytes()
    (own / name).write_bytes(struct.pack("<Q", 1 << 62) + data[8:])
    with pytest.raises(ModelError, match="damaged"):
        load_vision(own)


def test_pickled_weights_are_refused_with_a_sentence(own):
    for file in files_of(own):
        file.unlink()
    (own / "model.safetensors.index.json").unlink()
    (own / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(ModelError, match="pickled weights"):
        open_checkpoint(own, "vision")


def test_a_path_that_is_not_there():
    with pytest.raises(ModelError, match="no model folder at ./nowhere"):
        open_checkpoint("./nowhere", "vision")


# ---------------------------------------------------------------------------------------------------- fingerprint


@pytest.fixture
def print_of(tmp_path):
    return lambda folder: weights.fingerprint(open_checkpoint(folder, "vision"), cache=tmp_path / "cache")


def test_the_fingerprint_ignores_files_folders_prefixes_layouts_and_the_language_half(tmp_path, own, print_of):
    expected = print_of(own)
    assert load_vision(own).fingerprint == expected
    variants = {}
    for name, change in {
        "copied": lambda folder: None,
        "one file": lambda folder: rewrite(folder, files=1),
        "nested": lambda folder: rewrite(folder, files=3, prefix="nested"),
        "other language half": lambda folder: edit(folder, _scale_language),
    }.items():
        folder = Path(shutil.copytree(own, tmp_path / name))
        change(folder)
        variants[name] = print_of(folder)
    make_tiny(tmp_path / "hub layout", layout="hub", files=2)
    variants["hub layout"] = print_of(tmp_path / "hub layout")
    assert variants == dict.fromkeys(variants, expected)


def _scale_language(tensors):
    for name in tensors:
        if not name.startswith("visual."):
            tensors[name] = tensors[name] * 1.25


def test_the_fingerprint_sees_one_element_dtypes_the_vision_config_and_the_processor(tmp_path, own, print_of):
    def one_element(folder):
        def change(tensors):
            if "visual.blocks.0.attn.qkv.bias" in tensors:
                tensors["visual.blocks.0.attn.qkv.bias"][7] += 1e-6

        edit(folder, change)

    def other_dtype(folder):
        def change(tensors):
            if "visual.merger.ln_q.bias" in tensors:
                tensors["visual.merger.ln_q.bias"] = tensors["visual.merger.ln_q.bias"].to(torch.float64)

        edit(folder, change)

    def in_json(file, *keys, value):
        def change(folder):
            content = json.loads((folder / file).read_text())
            section = content
            for key in keys[:-1]:
                section = section[key]
            section[keys[-1]] = value
            (folder / file).write_text(json.dumps(content))

        return change

    prints = {"own": print_of(own)}
    for name, change in {
        "one element": one_element,
        "dtype": other_dtype,
        "heads": in_json("config.json", "vision_config", "num_heads", value=4),
        "theta": in_json("config.json", "vision_config", "rope_parameters", "rope_theta", value=5000.0),
        "mean": in_json("processor_config.json", "image_processor", "image_mean", value=[0.5, 0.5, 0.5]),
        "resample": in_json("processor_config.json", "image_processor", "resample", value=2),
    }.items():
        folder = Path(shutil.copytree(own, tmp_path / name))
        change(folder)
        prints[name] = print_of(folder)
    assert len(set(prints.values())) == len(prints)


def test_the_second_time_reads_no_tensor(own, tmp_path, monkeypatch):
    for file in own.iterdir():
        os.utime(file, (1_600_000_000, 1_600_000_000))
    checkpoint = open_checkpoint(own, "vision")
    first = weights.fingerprint(checkpoint, cache=tmp_path / "cache")
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("read the tower again"))
    assert weights.fingerprint(checkpoint, cache=tmp_path / "cache") == first


def test_a_file_touched_just_now_is_not_remembered(own, tmp_path):
    os.utime(files_of(own)[-1])
    weights.fingerprint(open_checkpoint(own, "vision"), cache=tmp_path / "cache")
    assert not (tmp_path / "cache" / "fingerprints").exists()


def test_defaults_are_transformers_own():
    """What a config leaves out means here what it means there."""
    from transformers import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

    from qvsplit.families import QWEN2_VL

    theirs = Qwen2VLVisionConfig().to_dict()
    assert {n: theirs[n] for n in QWEN2_VL.vision_settings} == {
        n: s.default for n, s in QWEN2_VL.vision_settings.items()
    }
    processor = Qwen2VLImageProcessor().to_dict()
    mine = {n: s.default for n, s in QWEN2_VL.processor_settings.items()}
    assert {n: list(v) if isinstance(v := processor[n], tuple) else v for n in mine} == mine


# ------------------------------------------------------------------------------------- album against a checkpoint


@pytest.fixture
def small_album(checkpoint, some_photos, tmp_path):
    extract_pictures([some_photos], out=tmp_path / "small", settings=Settings(model=str(checkpoint)))
    return open_album(tmp_path / "small")


def test_a_changed_tower_is_refused_at_ask(own, small_album):
    def change(tensors):
        if "visual.merger.mlp.2.bias" in tensors:
            tensors["visual.merger.mlp.2.bias"][0] += 1

    edit(own, change)
    with pytest.raises(RecipeError, match="another tower"):
        open_asker(small_album, AskSettings(model=str(own)))


def test_a_changed_language_half_is_asked_and_answers_as_its_own_whole_model(own, small_album, some_photos, whole):
    edit(own, _scale_language)
    asker = open_asker(small_album, AskSettings(model=str(own), max_new_tokens=12))
    assert asker.tower_check == "fingerprint"
    changed = WholeModel(own)
    row = next(iter(small_album))
    image = upright_rgb(some_photos / row.path)
    assert asker.answer(row, QUESTIONS[0]).tokens == changed.answer([image], QUESTIONS[0])
    assert changed.answer([image], QUESTIONS[0]) != whole.answer([image], QUESTIONS[0])


def test_a_language_only_checkpoint_of_ours_carries_a_note(own, small_album, tmp_path, some_photos, whole):
    with pytest.raises(ModelError):
        weights.save_language_half(tmp_path / "nowhere", tmp_path / "language")
    assert not (tmp_path / "language").exists()
    weights.save_language_half(own, tmp_path / "language")
    for file in files_of(tmp_path / "language"):
        with safe_open(file, framework="pt") as stream:
            assert not any("visual" in name for name in stream.keys())  # noqa: SIM118
    asker = open_asker(small_album, AskSettings(model=str(tmp_path / "language"), max_new_tokens=12))
    assert asker.tower_check == "note"
    row = next(iter(small_album))
    assert asker.answer(row, QUESTIONS[0]).tokens == whole.answer([upright_rgb(some_photos / row.path)], QUESTIONS[0])
    note = tmp_path / "language" / "qvsplit.json"
    note.write_text(json.dumps({"tower": "0" * 64}))
    with pytest.raises(RecipeError, match="another tower"):
        open_asker(small_album, AskSettings(model=str(tmp_path / "language")))


def test_without_any_evidence_it_refuses_and_names_the_option(own, small_album, tmp_path):
    weights.save_language_half(open_checkpoint(own, "both"), tmp_path / "language")
    (tmp_path / "language" / "qvsplit.json").unlink()
    with pytest.raises(RecipeError, match="--unchecked-tower"):
        open_asker(small_album, AskSettings(model=str(tmp_path / "language")))
    asker = open_asker(small_album, AskSettings(model=str(tmp_path / "language"), unchecked_tower=True))
    assert asker.tower_check == "unchecked"


def test_a_header_gives_the_offsets_of_the_tensors(own):
    file = files_of(own)[0]
    places = read_header(file)
    tensors = load_file(file)
    assert places.keys() == tensors.keys()
    data = file.read_bytes()
    for name, place in places.items():
        raw = data[place.start : place.start + place.size]
        assert raw == tensors[name].numpy().tobytes()


@pytest.mark.parametrize(
    ("method", "library"), [("bitsandbytes", "bitsandbytes"), ("gptq", "optimum"), ("awq", "gptqmodel")]
)
def test_a_quantised_checkpoint_without_its_library_says_which(own, method, library):
    if importlib.util.find_spec(library):
        pytest.skip(f"{library} is installed")
    config = json.loads((own / "config.json").read_text())
    more = {"load_in_4bit": True} if method == "bitsandbytes" else {"bits": 4, "group_size": 128}
    config["quantization_config"] = {"quant_method": method, **more}
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=library):
        weights.load_language(open_checkpoint(own, "language"), dtype=None)
