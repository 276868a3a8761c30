"""Loading exactly one half, from every layout there is, or an error that names the tensors."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qvsplit import weights
from qvsplit.answering.evidence import check_features
from qvsplit.ask import AskOptions, load_session
from qvsplit.checkpoints.hf import hearing_tensors
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.errors import ConfigError, ModelError, WeightsError
from qvsplit.extract import extract_files
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.runtime.versions import VersionWarning, warn_of_other_versions
from qvsplit.splitting import split_checkpoint
from qvsplit.store.opening import open_store
from tests.support import rows
from tests.support.checkpoints import edit, files_of, make_tiny, scale_language_model
from tests.support.full_model import QUESTIONS, FullModel, upright_rgb

CPU = torch.device("cpu")


@pytest.fixture
def own(checkpoint, tmp_path) -> Path:
    """A copy of the tiny checkpoint that a test may break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "own"))


def load_encoder_weights(folder: Path):
    return weights.load_encoder_weights(open_checkpoint(folder, "encoder"), device=CPU, dtype=torch.float32)


def load_language_model(folder: Path):
    return weights.load_language_model(open_checkpoint(folder, "language"), dtype=torch.float32, kernels="reference")


def load_full_model(folder: Path):
    return weights.load_full_model(open_checkpoint(folder, "both"), device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("load", [load_encoder_weights, load_language_model, load_full_model])
def test_a_version_that_answers_were_not_held_against_is_warned_of(checkpoint, load, monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda package: ["transformers<5"])
    warn_of_other_versions.cache_clear()
    with pytest.warns(VersionWarning, match=r"transformers .* held against \(<5\)"):
        load(checkpoint)
    warn_of_other_versions.cache_clear()


@pytest.mark.parametrize("layout", ["today", "hub"])
@pytest.mark.parametrize("prefix", ["hub", "nested", "mixed"])
@pytest.mark.parametrize(("files", "tied"), [(1, False), (4, True)])
def test_both_halves_have_the_full_models_weights(tmp_path, layout, prefix, files, tied):
    make_tiny(tmp_path / "model", layout=layout, prefix=prefix, files=files, tied=tied)
    expected = FullModel(tmp_path / "model").model.state_dict()
    encoder = {
        f"model.visual.{name}": t for name, t in load_encoder_weights(tmp_path / "model").module.state_dict().items()
    }
    language = load_language_model(tmp_path / "model").state_dict()
    assert encoder.keys() | language.keys() == expected.keys()
    assert not encoder.keys() & language.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in (encoder | language).items())


def test_only_the_encoders_bytes_are_read(own, monkeypatch):
    read: list[tuple[str, int]] = []
    real = os.preadv

    def counted(descriptor, buffers, offset):
        got = real(descriptor, buffers, offset)
        read.append((os.readlink(f"/proc/self/fd/{descriptor}"), got))
        return got

    monkeypatch.setattr(os, "preadv", counted)
    encoder = load_encoder_weights(own)
    size = sum(place.size for place in open_checkpoint(own, "encoder").encoder_places().values())
    assert sum(got for _, got in read) == size == encoder.bytes_read
    holding = {str(own / name) for name in open_checkpoint(own, "encoder").file_names("encoder")}
    assert {file for file, _ in read} == holding
    assert len(holding) < len(files_of(own))


def test_the_encoder_has_real_rotary_buffers(own):
    buffers = dict(load_encoder_weights(own).module.named_buffers())
    assert buffers
    assert all(not b.is_meta and bool(torch.isfinite(b).all()) for b in buffers.values())


def test_a_dtype_is_cast_once(own):
    encoder = load_encoder_weights(own).module.state_dict()
    cast = weights.load_encoder_weights(open_checkpoint(own, "encoder"), device=CPU, dtype=torch.bfloat16)
    assert all(torch.equal(t.to(torch.bfloat16), cast.module.state_dict()[n]) for n, t in encoder.items())
    assert cast.encoder_bytes * 2 == sum(t.numel() * 4 for t in encoder.values())


@pytest.mark.parametrize(
    ("lost", "load"),
    [("visual.blocks.1.mlp.fc1.bias", load_encoder_weights), ("model.layers.2.mlp.up_proj.weight", load_language_model),
     ("lm_head.weight", load_language_model), ("model.embed_tokens.weight", load_language_model)],
)  # fmt: skip
def test_a_missing_tensor_is_named_and_never_random(own, lost, load):
    edit(own, lambda tensors: tensors.pop(lost, None))
    with pytest.raises(WeightsError) as caught:
        load(own)
    assert [name for name in caught.value.missing if name.endswith(lost.split(".", 1)[1])]
    assert caught.value.unexpected == []


@pytest.mark.parametrize(
    ("extra", "load"),
    [("visual.blocks.9.norm1.weight", load_encoder_weights), ("model.extra.weight", load_language_model)],
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
    ("name", "load"), [("visual.merger.mlp.0.weight", load_encoder_weights), ("lm_head.weight", load_language_model)]
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


def test_the_language_model_needs_no_file_of_the_encoder_alone(tmp_path):
    """As after a download of that half only; and the encoder needs none of the language's."""
    make_tiny(tmp_path / "model", files=7)
    full = FullModel(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model", "both")
    only_encoder = set(checkpoint.file_names("encoder")) - set(checkpoint.file_names("language"))
    only_language = set(checkpoint.file_names("language")) - set(checkpoint.file_names("encoder"))
    assert only_encoder
    assert only_language
    expected = load_encoder_weights(tmp_path / "model").fingerprint
    shutil.copytree(tmp_path / "model", tmp_path / "encoder")
    for name in only_language:
        (tmp_path / "encoder" / name).unlink()
    assert load_encoder_weights(tmp_path / "encoder").fingerprint == expected
    for name in only_encoder:
        (tmp_path / "model" / name).unlink()
    language = load_language_model(tmp_path / "model").state_dict()
    assert all(torch.equal(tensor, full.model.state_dict()[name]) for name, tensor in language.items())


def test_device_map_is_handed_to_transformers(own):
    spread = {"model": "cpu", "lm_head": "meta"}
    model = weights.load_language_model(open_checkpoint(own, "language"), dtype=torch.bfloat16, device_map=spread)
    assert model.dtype == torch.bfloat16
    assert dict(model.hf_device_map) == spread


# ------------------------------------------------------------------------------------- store against a checkpoint


@pytest.fixture
def small_store(checkpoint, some_photos, tmp_path):
    extract_files([some_photos], out=tmp_path / "small", options=ExtractOptions(model=str(checkpoint)))
    return open_store(tmp_path / "small")


def test_a_changed_encoder_is_refused_at_ask(own, small_store):
    def change(tensors):
        if "visual.merger.mlp.2.bias" in tensors:
            tensors["visual.merger.mlp.2.bias"][0] += 1

    edit(own, change)
    with pytest.raises(ConfigError, match="another encoder"):
        load_session(small_store, AskOptions(model=str(own)))


def test_a_changed_language_model_is_asked_and_answers_as_its_own_full_model(own, small_store, some_photos, whole):
    edit(own, scale_language_model)
    session = load_session(small_store, AskOptions(model=str(own), max_new_tokens=12))
    assert session.encoder_check == "fingerprint"
    changed = FullModel(own)
    row = next(iter(small_store))
    image = upright_rgb(some_photos / row.path)
    assert session.answer(row, QUESTIONS[0]).tokens == changed.answer([image], QUESTIONS[0])
    assert changed.answer([image], QUESTIONS[0]) != whole.answer([image], QUESTIONS[0])


def test_a_language_only_checkpoint_of_ours_carries_a_note(own, small_store, tmp_path, some_photos, whole):
    with pytest.raises(ModelError):
        split_checkpoint(tmp_path / "nowhere", language_model=tmp_path / "language")
    assert not (tmp_path / "language").exists()
    split_checkpoint(own, language_model=tmp_path / "language")
    for file in files_of(tmp_path / "language"):
        with safe_open(file, framework="pt") as stream:
            assert not any("visual" in name for name in stream.keys())  # noqa: SIM118
    session = load_session(small_store, AskOptions(model=str(tmp_path / "language"), max_new_tokens=12))
    assert session.encoder_check == "note"
    row = next(iter(small_store))
    assert session.answer(row, QUESTIONS[0]).tokens == whole.answer([upright_rgb(some_photos / row.path)], QUESTIONS[0])
    note = tmp_path / "language" / "qvsplit.json"
    note.write_text(json.dumps({"encoder": "0" * 64}))
    with pytest.raises(ConfigError, match="another encoder"):
        load_session(small_store, AskOptions(model=str(tmp_path / "language")))


def test_without_any_evidence_it_refuses_and_names_the_option(own, small_store, tmp_path):
    split_checkpoint(open_checkpoint(own, "both"), language_model=tmp_path / "language")
    (tmp_path / "language" / "qvsplit.json").unlink()
    with pytest.raises(ConfigError, match="`unchecked_encoder=True`"):
        load_session(small_store, AskOptions(model=str(tmp_path / "language")))
    session = load_session(small_store, AskOptions(model=str(tmp_path / "language"), unchecked_encoder=True))
    assert session.encoder_check == "unchecked"


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
        weights.load_language_model(open_checkpoint(own, "language"), dtype=None)


def test_a_store_of_another_family_is_refused_for_that_alone(family_checkpoint):
    """Of another family everything else differs as well: a list of settings would hide the reason."""
    checkpoint = open_checkpoint(family_checkpoint("gemma3"), "language")
    with pytest.raises(ConfigError) as caught:
        check_features(rows.config(), 64, checkpoint)
    assert "(family: qwen2_vl, not gemma3)" in str(caught.value)


# ---------------------------------------------------------------------------------------------------- who hears of it


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_loading_is_heard_in_bytes_of_the_checkpoints_tensors(family_checkpoint, family):
    """Also where the model's parameters are stacked from many tensors of the checkpoint, as of experts."""
    folder = family_checkpoint(family)
    heard: list[tuple[str, int, int]] = []

    def on_load(*said):
        heard.append(said)

    encoder, language, both = (open_checkpoint(folder, half) for half in ("encoder", "language", "both"))
    sizes = {
        "encoder": sum(place.size for place in encoder.encoder_places().values()),
        "language": sum(place.size for place in language.places(language.language_names).values()),
        "both": sum(place.size for place in both.places(both.tensor_names("both")).values()),
    }
    load = {
        "encoder": lambda: weights.load_encoder_weights(encoder, device=CPU, dtype=torch.float32, on_load=on_load),
        "language": lambda: weights.load_language_model(language, dtype=torch.float32, on_load=on_load),
        "both": lambda: weights.load_full_model(both, dtype=torch.float32, device=CPU, on_load=on_load),
    }
    for half, size in sizes.items():
        heard.clear()
        load[half]()
        done = [read for part, read, total in heard if part == "tensors" and total == size]
        assert done[0] == 0
        assert done[-1] == size
        assert done == sorted(done)
        assert len(set(done)) > 10  # as it goes on


def test_another_progress_bar_of_transformers_stays_as_it_is(own):
    from transformers.utils import logging

    weights.load_language_model(open_checkpoint(own, "language"), dtype=None, on_load=lambda *said: None)
    assert logging.set_tqdm_hook(None) is None
    with hearing_tensors(lambda *said: pytest.fail("no loading"), {}):
        assert list(logging.tqdm(range(3), desc="Fetching files", disable=True)) == [0, 1, 2]


class Told:
    """What transformers tells of a parameter, in another version."""

    def __init__(self, targets) -> None:
        self.layer_targets = targets


@pytest.mark.parametrize(
    "parameters",
    [["a", "b"], [("a",), ("b",)], [("a", None), ("b", None)], [("a", Told(["a"])), ("b", Told({"b": 7}))],
     {"a": 1, "b": 2}],
)  # fmt: skip
def test_where_transformers_tells_other_things_all_is_loaded_and_only_the_bar_knows_less(parameters):
    from transformers.utils import logging

    heard = []
    with hearing_tensors(lambda *said: heard.append(said), {"a": 3, "b": 4}):
        assert list(logging.tqdm(parameters, desc="Loading weights")) == list(parameters)
        with logging.tqdm(total=2, desc="Loading weights", disable=True) as bar:
            bar.update(1)
        bar = logging.tqdm(parameters, desc="Loading weights", disable=True)
        bar.set_postfix(name="a")
        assert list(bar) == list(parameters)
    assert set(heard) == {("tensors", 0, 7)}


def test_where_transformers_has_no_such_hook_nothing_is_heard(monkeypatch):
    from transformers.utils import logging

    monkeypatch.delattr(logging, "set_tqdm_hook")
    with hearing_tensors(lambda *said: pytest.fail("no loading"), {}):
        assert list(logging.tqdm(range(3), desc="Loading weights", disable=True)) == [0, 1, 2]
