"""Reading a language model's tensors one ahead, inside transformers' own loading: which do, and that nothing differs."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvsplit.checkpoints import streaming
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.checkpoints.streaming import StreamedReading
from qvsplit.weights import load_language_model
from tests.support.checkpoints import files_of, make_tiny
from tests.support.families import FAMILIES

MERGED = {"qwen3_vl_moe", "qwen4_exp", "qwen3_omni_moe"}  # transformers puts their experts together


@pytest.fixture
def readings(monkeypatch) -> list[StreamedReading]:
    """Every reading that is made."""
    made: list[StreamedReading] = []
    init = StreamedReading.__init__

    def watched(self, *args):
        init(self, *args)
        made.append(self)

    monkeypatch.setattr(StreamedReading, "__init__", watched)
    return made


def loaded(folder, dtype=torch.float16):
    """The model; in float16 with transformers' own modules, whose state can be compared."""
    return load_language_model(open_checkpoint(folder, "language"), dtype=dtype)


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_of_every_family_are_read_ahead_but_where_they_are_merged(name, family_checkpoint, readings):
    loaded(family_checkpoint(name))
    assert [one.used for one in readings] == [name not in MERGED]


def test_the_state_is_that_of_transformers_own_reading(checkpoint, readings, monkeypatch):
    ours = loaded(checkpoint).state_dict()
    monkeypatch.setattr(streaming, "names_in_model", lambda *_: None)
    theirs = loaded(checkpoint)
    assert [one.used for one in readings] == [True, False]
    assert ours.keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.state_dict().items())
    assert theirs.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("read_by", ["us", "transformers"])
def test_our_own_modules_compute_what_transformers_do_whoever_read_the_files(checkpoint, monkeypatch, dtype, read_by):
    if read_by == "transformers":
        monkeypatch.setattr(streaming, "names_in_model", lambda *_: None)
    ours = loaded(checkpoint, dtype)
    assert type(ours.lm_head).__name__ == "OutputLayer"
    theirs = load_language_model(open_checkpoint(checkpoint, "language"), dtype=dtype, kernels="reference")
    with torch.inference_mode():
        got, expected = (model(input_ids=torch.arange(5, 25)[None]).logits for model in (ours, theirs))
    near = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(got, expected, rtol=near, atol=near * float(expected.abs().max()))


def test_buffers_that_no_checkpoint_holds_and_the_generation_config_are_there(checkpoint, monkeypatch):
    ours = loaded(checkpoint)
    monkeypatch.setattr(streaming, "names_in_model", lambda *_: None)
    theirs = loaded(checkpoint)
    mine, expected = dict(ours.named_buffers()), dict(theirs.named_buffers())
    assert expected and mine.keys() == expected.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in expected.items())
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert not ours.training


def test_where_transformers_has_another_method_it_reads_the_files_itself(checkpoint, readings, monkeypatch):
    from transformers import PreTrainedModel

    method = PreTrainedModel._load_pretrained_model
    other = staticmethod(lambda *args, **more: method(*args, **more))
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", other)
    model = loaded(checkpoint)
    assert [one.used for one in readings] == [False]
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_no_file_is_mapped_and_only_the_language_models_bytes_are_read(own, monkeypatch):
    read: list[int] = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: read.append(real(*args)) or read[-1])
    mapped: set[str] = set()

    def look(*_) -> None:  # at this checkpoint's files: models of other tests may be mapped in this process
        mapped.update(line for line in Path("/proc/self/maps").read_text().splitlines() if str(own) in line)

    opened = open_checkpoint(own, "language")
    load_language_model(opened, dtype=torch.float32, on_load=look)
    look()
    assert not mapped
    assert sum(read) == sum(place.size for place in opened.places(opened.language_names).values())
    model = load_language_model(opened, dtype=torch.float32, on_load=look, kernels="reference")
    look()
    assert mapped, "this way of looking would see nothing"
    del model


def test_no_more_than_two_tensors_are_in_memory_at_a_time(checkpoint, monkeypatch):
    monkeypatch.setattr(streaming, "BUFFER_BYTES", 0)  # each has memory of its own
    given: list[weakref.ref] = []
    most: list[int] = []
    make = streaming._Memory.of

    def watched(self, place):
        most.append(sum(one() is not None for one in given))
        view = make(self, place)
        given.append(weakref.ref(view.obj))
        return view

    monkeypatch.setattr(streaming._Memory, "of", watched)
    loaded(checkpoint, torch.bfloat16)
    assert len(most) > 20
    assert max(most) == 1


@pytest.mark.parametrize(
    ("tied", "stored"),
    [(True, "embedding and output"), (True, "output alone"), (True, "different ones"), (False, "embedding and output")],
)
def test_whichever_of_two_tied_matrices_a_checkpoint_holds(tmp_path, tied, stored):
    """As transformers has it: two that differ are not tied."""
    make_tiny(tmp_path / "model", tied=tied, files=1)
    (file,) = files_of(tmp_path / "model")
    tensors = load_file(file)
    (name,) = (one for one in tensors if one.endswith("embed_tokens.weight"))
    if tied:
        tensors["lm_head.weight"] = tensors[name].clone() + (1 if stored == "different ones" else 0)
        if stored == "output alone":
            del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    opened = open_checkpoint(tmp_path / "model", "language")
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        got, expected = (
            load_language_model(opened, dtype=torch.float32, kernels=kernels)(input_ids=ids).logits
            for kernels in ("fused", "reference")
        )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_tensors_larger_than_a_buffer_have_memory_of_their_own(checkpoint, monkeypatch):
    expected = loaded(checkpoint).state_dict()
    monkeypatch.setattr(streaming, "BUFFER_BYTES", 5000)
    got = loaded(checkpoint).state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
