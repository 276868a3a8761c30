"""Fingerprints: what they see, what they ignore, and when they are remembered."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from qvsplit.checkpoints.families import QWEN2_VL
from qvsplit.checkpoints.fingerprint import (
    canonical_json,
    encoder_fingerprint,
    fingerprint_of,
    language_fingerprint,
    noted_fingerprint,
)
from qvsplit.checkpoints.opening import DEMO_FOLDER, open_checkpoint
from qvsplit.weights import load_encoder_weights
from tests.support.checkpoints import edit, files_of, make_tiny, rewrite, scale_language_model


@pytest.fixture
def print_of(tmp_path):
    return lambda folder: encoder_fingerprint(open_checkpoint(folder, "encoder"), cache=tmp_path / "cache")


def test_the_fingerprint_ignores_files_folders_prefixes_layouts_and_the_language_model(tmp_path, own, print_of):
    expected = print_of(own)
    loaded = load_encoder_weights(open_checkpoint(own, "encoder"), device=torch.device("cpu"), dtype=torch.float32)
    assert loaded.fingerprint == expected
    variants = {}
    for name, change in {
        "copied": lambda folder: None,
        "one file": lambda folder: rewrite(folder, files=1),
        "nested": lambda folder: rewrite(folder, files=3, prefix="nested"),
        "other language model": lambda folder: edit(folder, scale_language_model),
    }.items():
        folder = Path(shutil.copytree(own, tmp_path / name))
        change(folder)
        variants[name] = print_of(folder)
    make_tiny(tmp_path / "hub layout", layout="hub", files=2)
    variants["hub layout"] = print_of(tmp_path / "hub layout")
    assert variants == dict.fromkeys(variants, expected)


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
    checkpoint = open_checkpoint(own, "encoder")
    first = encoder_fingerprint(checkpoint, cache=tmp_path / "cache")
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("read the encoder again"))
    assert encoder_fingerprint(checkpoint, cache=tmp_path / "cache") == first


def test_a_file_touched_just_now_is_not_remembered(own, tmp_path):
    os.utime(files_of(own)[-1])
    encoder_fingerprint(open_checkpoint(own, "encoder"), cache=tmp_path / "cache")
    assert not (tmp_path / "cache" / "fingerprints").exists()


def test_the_fingerprint_of_a_checkpoint_that_never_changes():
    """Stores out there name their encoder so: the value must stay, bit for bit."""
    opened = open_checkpoint(DEMO_FOLDER, "both")
    assert encoder_fingerprint(opened) == "81f9207703b186351ac0d2bca38fd77673b66fd115b8649dc8d4ffdf6f552100"


def test_what_is_hashed_is_this_json(own):
    opened = open_checkpoint(own, "encoder")
    places = opened.encoder_places()
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in places}
    defaults = [
        {name: setting.default for name, setting in wanted.items() if setting.default is not None}
        for wanted in (QWEN2_VL.vision_settings, QWEN2_VL.processor_settings)
    ]
    content = {
        "family": "qwen2_vl",
        "vision": defaults[0] | {"depth": 3, "embed_dim": 64, "num_heads": 2, "hidden_size": 128},
        "processor": defaults[1],
        "tensors": [
            [name.removeprefix("visual."), "F32", list(places[name].shape), digests[name]] for name in sorted(places)
        ],
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":")).replace("10000.0", "10000")
    assert fingerprint_of(opened, places, digests) == hashlib.sha256(text.encode()).hexdigest()


def test_canonical_json_does_not_tell_four_from_four():
    assert canonical_json({"b": 4.0, "a": (1, 2.5), 3: None}) == b'{"3":null,"a":[1,2.5],"b":4}'


@pytest.mark.parametrize("damage", ["nothing", "{}", '{"fingerprint": 5}', '{"fingerprint": "abc"}', "[]"])
def test_a_damaged_memory_is_computed_again(own, tmp_path, damage):
    for file in own.iterdir():
        os.utime(file, (1_600_000_000, 1_600_000_000))
    opened = open_checkpoint(own, "encoder")
    first = encoder_fingerprint(opened, cache=tmp_path / "cache")
    (entry,) = (tmp_path / "cache" / "fingerprints").iterdir()
    entry.write_text(damage)
    assert encoder_fingerprint(opened, cache=tmp_path / "cache") == first
    assert json.loads(entry.read_text()) == {"fingerprint": first}


def test_a_cache_that_cannot_be_written_only_costs_time(own, tmp_path):
    for file in own.iterdir():
        os.utime(file, (1_600_000_000, 1_600_000_000))
    (tmp_path / "cache").write_text("a file in the way")
    assert len(encoder_fingerprint(open_checkpoint(own, "encoder"), cache=tmp_path / "cache")) == 64


def test_the_language_models_fingerprint_sees_its_tensors_and_files_and_no_encoder(tmp_path, own):
    def one_element(tensors):
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"][0, 0] += 1e-6

    def encoder_alone(tensors):
        if "visual.merger.ln_q.bias" in tensors:
            tensors["visual.merger.ln_q.bias"] += 1

    def template(folder):
        (folder / "chat_template.jinja").write_text((folder / "chat_template.jinja").read_text() + " ")

    def other(name, change):
        folder = Path(shutil.copytree(own, tmp_path / name))
        change(folder)
        return language_fingerprint(open_checkpoint(folder, "language"))

    first = language_fingerprint(open_checkpoint(own, "language"))
    assert other("copied", lambda folder: None) == first
    assert other("encoder", lambda folder: edit(folder, encoder_alone)) == first
    assert other("modelscope", lambda folder: (folder / "configuration.json").write_text('{"task": "x"}')) == first
    changed = {other("element", lambda folder: edit(folder, one_element)), other("template", template)}
    assert len(changed | {first}) == 3


def test_a_remembered_fingerprint_of_a_language_model_is_not_of_other_files(own):
    """Also of such as few tokenizers have."""
    for path in own.iterdir():
        os.utime(path, (1e9, 1e9))
    for name in ("tokenizer.model", "tekken.json"):
        first = language_fingerprint(open_checkpoint(own, "language"))
        assert language_fingerprint(open_checkpoint(own, "language")) == first
        (own / name).write_text("{}")
        os.utime(own / name, (1e9, 1e9))
        assert language_fingerprint(open_checkpoint(own, "language")) != first


def test_a_note_is_read_and_only_if_it_is_one(own):
    opened = open_checkpoint(own, "language")
    assert noted_fingerprint(opened) is None
    (own / "qvsplit.json").write_text(json.dumps({"encoder": "0" * 64}))
    assert noted_fingerprint(opened) == "0" * 64
    (own / "qvsplit.json").write_text(json.dumps({"encoder": 7}))
    assert noted_fingerprint(opened) is None
