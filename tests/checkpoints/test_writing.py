"""Safetensors files and checkpoints written from bytes that lie elsewhere, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qvsplit.checkpoints import writing
from qvsplit.checkpoints.files import INDEX_FILE, NOTE_FILE, small_files
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.checkpoints.tensors import TensorPlace, read_header, read_in_pieces
from qvsplit.errors import DiskError, ModelError
from tests.support.checkpoints import files_of, write_checkpoint


def places_of(folder: Path, half: str = "both") -> dict[str, TensorPlace]:
    opened = open_checkpoint(folder, "both")
    return opened.places(opened.tensor_names(half))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in files_of(folder) for name, tensor in load_file(file).items()}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == wanted[name].dtype and found[name].equal(wanted[name]) for name in wanted)


def test_a_file_is_what_the_format_s_own_library_writes(tmp_path):
    tensors = {
        "odd": torch.arange(3, dtype=torch.bfloat16), "wide": torch.arange(6, dtype=torch.float64).view(2, 3),
        "one": torch.tensor(7.0), "flags": torch.tensor([True, False, True]),
        "näme": torch.arange(5, dtype=torch.float16),
    }  # fmt: skip
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    places = read_header(tmp_path / "theirs")
    writing.write_safetensors(tmp_path / "ours", dict(reversed(places.items())))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_of_several_files_and_dtypes_lie_at_multiples_of_their_width(tmp_path):
    save_file({"a": torch.arange(3, dtype=torch.float16), "b": torch.arange(3)}, tmp_path / "1.safetensors")
    save_file(
        {"c": torch.arange(5.0), "d": torch.ones(1, dtype=torch.uint8), "none": torch.empty(0, 4)},
        tmp_path / "2.safetensors",
    )
    places = read_header(tmp_path / "1.safetensors") | read_header(tmp_path / "2.safetensors")
    writing.write_safetensors(tmp_path / "both.safetensors", places)
    written = read_header(tmp_path / "both.safetensors")
    widths = {"a": 2, "b": 8, "c": 4, "d": 1}
    assert all(written[name].start % width == 0 for name, width in widths.items())
    with safe_open(tmp_path / "both.safetensors", framework="pt") as stream:
        assert stream.metadata() == {"format": "pt"}
        assert stream.get_tensor("none").shape == (0, 4)
        assert stream.get_tensor("c").tolist() == [0, 1, 2, 3, 4]


def test_names_may_be_others_than_those_that_are_copied(tmp_path):
    save_file({"model.a": torch.arange(3)}, tmp_path / "1.safetensors")
    places = read_header(tmp_path / "1.safetensors")
    writing.write_safetensors(tmp_path / "2.safetensors", {"a": places["model.a"]})
    assert load_file(tmp_path / "2.safetensors")["a"].tolist() == [0, 1, 2]


def test_bytes_are_read_in_pieces_that_end_with_their_tensor(tmp_path):
    save_file({"a": torch.arange(10, dtype=torch.uint8), "b": torch.arange(3, dtype=torch.uint8)}, tmp_path / "file")
    places = read_header(tmp_path / "file")
    pieces = [bytes(piece) for piece in read_in_pieces([places["a"], places["b"]], 4)]
    assert pieces == [bytes(range(4)), bytes(range(4, 8)), bytes([8, 9]), bytes(range(3))]


def test_a_half_is_a_checkpoint(checkpoint, tmp_path):
    folder = tmp_path / "new" / "encoder"
    note = {"half": "encoder"}
    write_checkpoint(folder, places_of(checkpoint, "encoder"), small=small_files(checkpoint), note=note)
    opened = open_checkpoint(folder, "encoder")
    wanted = {name: tensor for name, tensor in tensors_of(checkpoint).items() if opened.family.is_encoders(name)}
    assert_equal(tensors_of(folder), wanted)
    assert json.loads((folder / NOTE_FILE).read_text()) == note
    assert {path.name for path in small_files(folder)} == {path.name for path in small_files(checkpoint)}
    assert [path.name for path in folder.parent.iterdir()] == ["encoder"]


def test_files_are_bounded_and_an_index_says_what_they_hold(checkpoint, tmp_path):
    places, most = places_of(checkpoint), 200_000
    write_checkpoint(tmp_path / "new", places, small=[], note={}, file_bytes=most)
    assert_equal(tensors_of(tmp_path / "new"), tensors_of(checkpoint))
    files = files_of(tmp_path / "new")
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "new" / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(place.size for place in places.values())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    for file in files:
        held = read_header(file)
        assert sum(place.size for place in held.values()) <= most or len(held) == 1


def test_a_folder_that_exists_is_left_alone(checkpoint, tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ModelError, match="mine exists; give a new folder"):
        write_checkpoint(tmp_path / "mine", places_of(checkpoint), small=[], note={})
    assert (tmp_path / "mine").read_text() == "kept"


def test_on_a_full_disk_nothing_is_left_behind(checkpoint, tmp_path, monkeypatch):
    synced = iter(range(10))

    def full(descriptor: int) -> None:
        if next(synced) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        DiskError, match="new: the disk is full; nothing of it is left; make room and run again"
    ) as said:
        write_checkpoint(tmp_path / "new", places_of(checkpoint), small=[], note={}, file_bytes=200_000)
    assert said.value.exit_code == 7
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_nothing_else(checkpoint, tmp_path):
    names = (".new.1.tmp", ".new.2.tmp", ".new.mine.tmp", ".newer.1.tmp")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"some")
    with writing._locked(tmp_path / ".new.2.tmp"):  # somebody fills it
        write_checkpoint(tmp_path / "new", places_of(checkpoint), small=[], note={})
    assert {path.name for path in tmp_path.iterdir()} == {*names[1:], "new"}


def test_nobody_removes_what_is_being_filled(tmp_path):
    with writing.new_folder(tmp_path / "new") as unfinished:
        writing._remove_abandoned(tmp_path / "new")
        assert unfinished.is_dir()


def test_a_source_that_changes_meanwhile_is_refused_and_nothing_is_left(own, tmp_path):
    places = places_of(own)
    with files_of(own)[-1].open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(ModelError, match="changed while it was read"):
        write_checkpoint(tmp_path / "new", places, small=[], note={})
    assert not [path for path in tmp_path.iterdir() if path != own]
