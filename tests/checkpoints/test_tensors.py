"""Where tensors lie in safetensors files, and their raw bytes."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.checkpoints.tensors import read_ahead, read_header, read_tensors, torch_dtype_name
from qvsplit.errors import ModelError
from tests.support.checkpoints import files_of


def test_a_header_gives_the_offsets_of_the_tensors(own):
    file = files_of(own)[0]
    places = read_header(file)
    tensors = load_file(file)
    assert places.keys() == tensors.keys()
    data = file.read_bytes()
    for name, place in places.items():
        raw = data[place.start : place.start + place.size]
        assert raw == tensors[name].numpy().tobytes()


def test_tensors_are_read_in_the_order_in_which_they_lie(own):
    opened = open_checkpoint(own, "both")
    places = dict(reversed(opened.places(opened.tensor_names("both")).items()))
    expected = {name: tensor.numpy().tobytes() for file in files_of(own) for name, tensor in load_file(file).items()}
    names = []
    for name, raw in read_tensors(places):
        assert bytes(raw) == expected[name]
        names.append(name)
    assert names == sorted(places, key=lambda name: (places[name].file, places[name].start))


WAYS = {
    "read_tensors": read_tensors,
    "read_ahead": lambda places: read_ahead(places, lambda place: memoryview(bytearray(place.size))),
}


def replaced(file, tmp_path) -> None:
    """Put other bytes in a file's place by renaming, as a download does."""
    (tmp_path / "other").write_bytes(bytes(file.stat().st_size))
    (tmp_path / "other").replace(file)


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_was_cut_since_its_header_was_read(own, way):
    opened = open_checkpoint(own, "both")
    places = opened.places(opened.tensor_names("both"))
    last = max(places.values(), key=lambda place: (place.file, place.start))
    with last.file.open("r+b") as stream:
        stream.truncate(last.start + last.size - 1)
    with pytest.raises(ModelError, match="changed while it was read"):
        list(WAYS[way](places))
    with pytest.raises(ModelError, match=f"ends inside tensor {last.name}"):
        list(WAYS[way]({name: replace(place, written=None) for name, place in places.items()}))


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_renamed_over_is_read_to_its_end_as_it_was(own, tmp_path, way):
    file = files_of(own)[0]
    places = read_header(file)
    expected = {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}
    for number, (name, raw) in enumerate(WAYS[way](places)):
        if number == 3:
            replaced(file, tmp_path)
        assert bytes(raw) == expected[name]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["renamed over before it is read", "written into"])
def test_a_file_that_is_no_longer_what_its_header_said_is_refused(own, tmp_path, way, how):
    opened = open_checkpoint(own, "both")
    places = opened.places(opened.tensor_names("both"))
    first, *_, last = files_of(own)

    def read() -> None:
        for number, _ in enumerate(WAYS[way](places)):
            if number == 1 and how == "written into":
                os.utime(first, ns=(0, 0))
            elif number == 1:
                replaced(last, tmp_path)

    with pytest.raises(ModelError, match="changed while it was read"):
        read()


def test_reading_ahead_lends_memory_again_only_after_it_has_been_used(own):
    opened = open_checkpoint(own, "both")
    places = opened.places(opened.tensor_names("both"))
    expected = {name: tensor.numpy().tobytes() for file in files_of(own) for name, tensor in load_file(file).items()}
    buffers = [bytearray(max(place.size for place in places.values())) for _ in range(2)]
    lent: list[str] = []

    def memory(place):
        lent.append(place.name)
        return memoryview(buffers[len(lent) % 2])[: place.size]

    names = []
    for name, view in read_ahead(places, memory):
        names.append(name)
        assert len(lent) <= len(names) + 1  # one ahead, no more
        assert bytes(view) == expected[name]
    assert names == lent == sorted(places, key=lambda one: (places[one].file, places[one].start))
    assert list(read_ahead({}, memory)) == []


@pytest.mark.parametrize(
    ("stored", "name"), [("F64", "float64"), ("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")]
)
def test_torchs_names(stored, name):
    assert torch_dtype_name(stored) == name


def test_a_dtype_without_a_name_of_torchs_is_refused():
    with pytest.raises(ModelError, match="stored as F8_E4M3"):
        torch_dtype_name("F8_E4M3")
