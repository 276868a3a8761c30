"""Files at hand: encoded in memory, as an extraction would have done it, and kept nowhere."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qvsplit import on_demand
from qvsplit.answering.options import AskOptions
from qvsplit.ask import checked_language_model, load_session, session_over
from qvsplit.errors import ConfigError, UsageError
from qvsplit.extract import extract_files
from qvsplit.on_demand import encoder_options, files_at_hand
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.store.opening import open_store
from tests.support.clips import make_clip
from tests.support.extracting import OLD
from tests.support.hub_server import NAME, Hub, point_at

QUESTIONS = ["What is in the image?", "Day or night?"]
OPTIONS = AskOptions(max_new_tokens=8)


@pytest.fixture(scope="module")
def folder(four_photos_here, tmp_path_factory) -> Path:
    """Photographs, one turned, one damaged, a copy, and a video of two seconds. Read only."""
    folder = tmp_path_factory.mktemp("files") / "photos"
    folder.mkdir()
    for path in four_photos_here:
        shutil.copyfile(path, folder / path.name)
    shutil.copyfile(folder / "coffee.png", folder / "copy.png")
    (folder / "torn.jpg").write_bytes((folder / "rocket.jpg").read_bytes()[:5000])
    make_clip(folder / "clip.mp4", 50)
    for path in folder.iterdir():
        os.utime(path, OLD)
    return folder


@pytest.fixture(scope="module")
def four_photos_here(photos) -> list[Path]:
    return [photos / name for name in ("chelsea.png", "coffee.png", "rocket.jpg", "turned.jpg")]


@pytest.fixture(scope="module")
def extracted(folder, checkpoint, tmp_path_factory) -> Path:
    """The store of all of them, the video in clips of a second. Read only."""
    out = tmp_path_factory.mktemp("stores") / "embeds"
    extract_files([folder], out=out, options=ExtractOptions(model=str(checkpoint), clip_seconds=1.0, fps=4.0))
    return out


@pytest.fixture(scope="module")
def few(folder, checkpoint, tmp_path_factory) -> Path:
    """A store of the video and one image, under another name, with limits of its own. Read only."""
    elsewhere, out = tmp_path_factory.mktemp("elsewhere"), tmp_path_factory.mktemp("few") / "embeds"
    shutil.copy2(folder / "clip.mp4", elsewhere / "first.mp4")
    shutil.copy2(folder / "rocket.jpg", elsewhere / "other name.jpg")
    extract_files([elsewhere], out=out, options=ExtractOptions(model=str(checkpoint), clip_seconds=1.0, fps=4.0))
    return out


def names(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def answers(session, rows) -> list[list[int]]:
    return [answer.tokens for answer in session.survey(rows, QUESTIONS)]


def comparable(row):
    """A row but for what an extraction alone knows."""
    return replace(row, generation=0, has_features=False, version=None)


def test_rows_features_and_answers_are_those_of_an_extraction(folder, extracted, checkpoint):
    store = open_store(extracted)
    options = ExtractOptions(model=str(checkpoint), clip_seconds=1.0, fps=4.0)
    with files_at_hand(names(folder), options=options) as files:
        assert files.encoded == 5  # four photographs and the video; a copy is none
        assert list(map(comparable, files.rows)) == list(map(comparable, store.rows))
        for row in files:
            mine, theirs = files.features(row), store.features(row)
            assert mine.tensors.keys() == theirs.tensors.keys()
            for name, tensor in mine.tensors.items():
                assert np.array_equal(tensor.raw, theirs.tensors[name].raw), row.name
            assert (mine.grid_thw, mine.placeholder, mine.inputs) == (
                theirs.grid_thw,
                theirs.placeholder,
                theirs.inputs,
            )
        at_hand, stored = session_over(files, OPTIONS), load_session(store, OPTIONS)
        assert at_hand.encoder_check == stored.encoder_check == "fingerprint"
        assert answers(at_hand, list(files)) == answers(stored, list(store))
        assert len(list(files)) == 7  # five images and two clips


def test_what_a_store_has_by_content_is_taken_from_there(folder, few, monkeypatch):
    def nobody(*_, **__):
        raise AssertionError("the encoder was loaded")

    monkeypatch.setattr(on_demand, "load_devices", nobody)
    store = open_store(few)
    with files_at_hand([folder / "clip.mp4", folder / "rocket.jpg", folder / "torn.jpg"], store=store) as files:
        assert files.encoded == 0
        assert [row.name for row in files.rows] == ["clip.mp4#0", "clip.mp4#1", "rocket.jpg", "torn.jpg"]
        assert [row.status for row in files.rows] == ["ok", "ok", "ok", "failed"]
        for row in files.rows[:3]:
            assert row.root == str(folder.resolve())
            assert files.features(row).n_tokens == row.n_tokens


def test_all_else_is_encoded_as_the_store_was(folder, few, extracted):
    store, whole = open_store(few), open_store(extracted)
    before = fingerprint(few)
    wanted = [folder / name for name in ("chelsea.png", "rocket.jpg", "clip.mp4")]
    with files_at_hand(wanted, store=store, options=encoder_options(store, OPTIONS)) as files:
        assert files.encoded == 1
        assert [row.path for row in files.rows] == ["chelsea.png", "rocket.jpg", "clip.mp4", "clip.mp4"]  # as given
        rows = [row for row in whole if row.path in {"chelsea.png", "rocket.jpg", "clip.mp4"}]
        mine = sorted(files.rows, key=lambda row: row.name)
        assert answers(session_over(files, OPTIONS), mine) == answers(load_session(whole, OPTIONS), rows)
        both = sorted(row.path for row in (*files.rows, *store))
        assert sorted(row.path for row in files) == both  # the store's items are there as well
    assert fingerprint(few) == before


def test_devices_are_those_of_the_store_and_of_files_encoded_now(folder, few, monkeypatch):
    """The store's shards say that a GPU made them; what it lacks is encoded here."""
    store = open_store(few)
    for shard in store.catalogue.shards:
        made = tuple(replace(one, device="cuda:0, cuda:1") for one in shard.schema.provenance)
        object.__setattr__(shard, "schema", replace(shard.schema, provenance=made))
    with files_at_hand([folder / "rocket.jpg"], store=store) as files:
        assert (files.encoded, files.device_types) == (0, {"cuda"})
    options = replace(encoder_options(store, OPTIONS), device="cpu")
    with files_at_hand([folder / "rocket.jpg", folder / "chelsea.png"], store=store, options=options) as files:
        assert (files.encoded, files.device_types) == (1, {"cuda", "cpu"})


def fingerprint(store: Path) -> dict[str, tuple[int, int]]:
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in store.rglob("*") if file.is_file()}


def test_a_file_that_has_changed_since_it_was_extracted_is_read_as_it_is_now(folder, checkpoint, tmp_path):
    file, out = tmp_path / "a.png", tmp_path / "embeds"
    shutil.copy2(folder / "coffee.png", file)
    extract_files([file], out=out, options=ExtractOptions(model=str(checkpoint)))
    shutil.copy2(folder / "chelsea.png", file)
    store = open_store(out)
    with files_at_hand(file, store=store) as files:
        (row,) = files.rows
        assert files.encoded == 1
        assert row.key == store["a.png"].key
        assert row.sha256 != store["a.png"].sha256
        assert files.current(*row.key) == files[str(file)] == row


def test_what_cannot_be_read_has_a_failed_row_and_the_others_are_encoded(folder, checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text("no image")
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    bad = [tmp_path / name for name in ("text.txt", "dangling.jpg", "pipe.jpg", "no such.jpg")]
    wanted = [bad[0], folder / "coffee.png", *bad[1:], folder / "torn.jpg", folder / "coffee.png" / "below.jpg"]
    with files_at_hand(wanted, options=ExtractOptions(model=str(checkpoint))) as files:
        errors = {Path(file.name).name: files.rows_of(file)[0].error for file in files.files}
    assert errors == {
        "text.txt": "is not an image or a video that can be read (by its content, whatever its name)",
        "coffee.png": None,
        "dangling.jpg": on_demand.NOT_FOUND,
        "pipe.jpg": "is not a regular file",
        "no such.jpg": on_demand.NOT_FOUND,
        "torn.jpg": "is a JPEG file that is cut off or damaged",
        "below.jpg": on_demand.NOT_FOUND,
    }


def test_a_file_that_disappears_before_it_is_read(folder, checkpoint, tmp_path, fake):
    file = tmp_path / "a.png"
    shutil.copy2(folder / "coffee.png", file)
    hears = on_demand.ExtractCallbacks(on_plan=lambda number: file.unlink())
    with files_at_hand([file], callbacks=hears) as files:
        (row,) = files.rows
    assert (row.status, row.error) == ("failed", on_demand.NOT_FOUND)
    assert fake.loads == 0


@pytest.fixture
def fake(fake_model, monkeypatch):
    """The fake encoder in place of a real one, here too."""
    monkeypatch.setattr(on_demand, "load_devices", fake_model.load_devices)
    return fake_model


def test_a_file_given_twice_is_encoded_once_and_stands_twice_in_the_list(folder, fake, monkeypatch):
    monkeypatch.chdir(folder)
    with files_at_hand(["coffee.png", "./coffee.png", "copy.png", str(folder / "coffee.png")]) as files:
        assert files.encoded == 1
        assert [row.path for row in files.rows] == ["coffee.png", "copy.png"]
        assert [files.rows_of(file)[0].path for file in files.files] == ["coffee.png"] * 2 + ["copy.png", "coffee.png"]
    assert sum(map(len, fake.batches)) == 1


def test_a_folder_is_refused_before_anything_is_read(folder, fake):
    with pytest.raises(UsageError, match="is a folder; give the files in it"):
        files_at_hand([folder / "coffee.png", folder])
    assert fake.batches == []


def test_names_are_those_that_an_extraction_into_the_store_would_give(fake, extract, folder, out, tmp_path):
    """Below a root that the store has, a file is named from there on."""
    below = tmp_path / "root" / "below"
    below.mkdir(parents=True)
    shutil.copyfile(folder / "coffee.png", below / "coffee.png")
    extract(tmp_path / "root")
    store = open_store(out)
    with files_at_hand([below / "coffee.png"], store=store) as files:
        (row,) = files.rows
    assert row.key == store["below/coffee.png"].key == (str(tmp_path.resolve() / "root"), "below/coffee.png")
    with files_at_hand([below / "coffee.png"]) as files:
        assert files.rows[0].key == (str(below.resolve()), "coffee.png")


@pytest.mark.parametrize("change", ["size", "time", "inode", "deleted", "bytes alone"])
def test_a_change_on_disk_is_seen(change, folder, fake, tmp_path):
    file, other = tmp_path / "a.png", tmp_path / "b.png"
    for path in (file, other):
        shutil.copyfile(folder / "coffee.png", path)
        os.utime(path, OLD)
    with files_at_hand([file]) as files:
        (given,) = files.files
        assert not files.is_changed(given)
        if change == "size":
            with file.open("ab") as stream:
                stream.write(b"more")
            os.utime(file, OLD)
        elif change == "time":
            os.utime(file, (OLD[0], OLD[1] + 1))
        elif change == "inode":
            other.replace(file)
        elif change == "bytes alone":
            with file.open("r+b") as stream:
                stream.write(b"other")
            os.utime(file, OLD)
        else:
            file.unlink()
        assert files.is_changed(given)


def test_another_mode_is_no_change(folder, fake, tmp_path):
    file = tmp_path / "a.png"
    shutil.copyfile(folder / "coffee.png", file)
    os.utime(file, OLD)
    with files_at_hand([file]) as files:
        file.chmod(0o600)
        assert not files.is_changed(files.files[0])


def test_a_file_above_the_target_of_a_link_is_the_one_that_opens(folder, fake, tmp_path, monkeypatch):
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/deep")
    shutil.copyfile(folder / "coffee.png", tmp_path / "x.png")
    shutil.copyfile(folder / "chelsea.png", tmp_path / "real" / "x.png")
    monkeypatch.chdir(tmp_path)
    with files_at_hand(["link/../x.png"]) as files:
        (row,) = files.rows
        assert row.key == (str(tmp_path.resolve() / "real"), "x.png")
        assert row.sha256 == hashlib.sha256((folder / "chelsea.png").read_bytes()).hexdigest()


@pytest.mark.parametrize("known", [False, True])
def test_that_an_image_has_more_frames_than_were_looked_at_is_known(known, fake, extract, out, tmp_path, monkeypatch):
    """Also beside a store that has its features, and was made before frames were counted."""
    (tmp_path / "files").mkdir()
    file = tmp_path / "files" / "moving.gif"
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    frames[0].save(file, save_all=True, append_images=frames[1:])
    store = None
    if known:
        with monkeypatch.context() as before:
            before.setattr("qvsplit.pipeline.rows._unseen_frames", lambda result: None)
            extract(tmp_path / "files")
        store = open_store(out)
        assert store["moving.gif"].warnings is None
    with files_at_hand([file], store=store) as files:
        assert files.encoded == (not known)
        assert files.rows[0].warnings == "only the first of 3 frames was looked at"


def test_a_fresh_file_is_hashed_again_since_its_time_may_be_too_coarse(folder, fake, tmp_path):
    file = tmp_path / "a.png"
    shutil.copyfile(folder / "coffee.png", file)
    before = file.stat()
    with files_at_hand([file]) as files:
        (given,) = files.files
        assert not files.is_changed(given)
        with file.open("r+b") as stream:
            stream.write(b"other")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert files.is_changed(given)


def test_beyond_a_bound_features_lie_in_a_file_without_a_name(folder, fake, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    wanted = names(folder)
    with files_at_hand(wanted) as files:
        expected = {row.name: files.features(row) for row in files}
        assert open_descriptors(tmp_path) == 0
    sizes = [sum(one.raw.nbytes for one in features.tensors.values()) for features in expected.values()]
    monkeypatch.setattr(on_demand, "IN_MEMORY_BYTES", sum(sizes) // 2)
    with files_at_hand(wanted) as files:
        assert open_descriptors(tmp_path) == 1
        assert files._made.held._places
        assert len(files._made.held._places) < len(files._made.held._features)
        for row in files:
            mine, theirs = files.features(row), expected[row.name]
            assert {name: one.raw.tolist() for name, one in mine.tensors.items()} == {
                name: one.raw.tolist() for name, one in theirs.tensors.items()
            }
    assert open_descriptors(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


def open_descriptors(folder: Path) -> int:
    """Count this process's open files without a name in `folder`."""
    found = 0
    for one in Path("/proc/self/fd").iterdir():
        try:
            found += os.readlink(one).startswith(f"{folder}/")
        except OSError:
            continue
    return found


def test_the_encoder_is_gone_before_the_language_model_comes(folder, checkpoint, monkeypatch):
    from qvsplit.models import encoder, language

    encoders, alive = [], []
    load_encoder, load_language = encoder.load_encoder, language.load

    def noted(*given, **more):
        loaded = load_encoder(*given, **more)
        encoders.append(weakref.ref(loaded))
        return loaded

    def counted(*given, **more):
        alive.append(sum(one() is not None for one in encoders))
        return load_language(*given, **more)

    monkeypatch.setattr(encoder, "load_encoder", noted)
    monkeypatch.setattr(language, "load", counted)
    gc.disable()  # nobody's collection but our own
    try:
        with files_at_hand([folder / "coffee.png"], options=ExtractOptions(model=str(checkpoint))) as files:
            session_over(files, OPTIONS)
    finally:
        gc.enable()
    assert (len(encoders), alive) == (1, [0])


def test_a_store_of_another_model_is_refused_before_anything_is_encoded(few, folder, family_checkpoint, fake):
    store = open_store(few)
    with pytest.raises(ConfigError):
        encoder_options(store, AskOptions(model=str(family_checkpoint("qwen2_5_vl"))))
    assert fake.loads == 0


def test_files_without_a_store_are_encoded_by_the_kernels_that_answer(few):
    asked = AskOptions(kernels="reference")
    assert encoder_options(None, asked).kernels == "reference"
    assert encoder_options(None, AskOptions()).kernels is None  # a family may have but one
    assert encoder_options(open_store(few), asked).kernels is None  # the store's own


def test_from_a_hub_no_byte_is_fetched_twice_for_the_two_halves(folder, checkpoint, tmp_path, monkeypatch):
    with Hub(checkpoint) as hub:
        point_at(monkeypatch, hub.url, tmp_path)
        with files_at_hand([folder / "chelsea.png"], options=encoder_options(None, AskOptions(model=NAME))) as files:
            checked_language_model(files, AskOptions(model=NAME))
        weights = [asked for asked in hub.asked if asked.name.endswith(".safetensors")]
        assert all(asked.range is None for asked in weights)
        assert {asked.name for asked in weights} == {path.name for path in checkpoint.glob("*.safetensors")}


def test_options_that_are_not_the_stores_are_refused_before_anything_is_loaded(few, folder, fake):
    with pytest.raises(ConfigError, match="storage_dtype"):
        files_at_hand([folder / "coffee.png"], store=open_store(few), options=ExtractOptions(storage_dtype="int8"))
    assert fake.loads == 0


def test_a_language_model_alone_asks_with_the_encoder_of_the_store(few, folder, checkpoint, tmp_path):
    from qvsplit.splitting import split_checkpoint

    alone = tmp_path / "language"
    split_checkpoint(checkpoint, language_model=alone)
    store, asked = open_store(few), replace(OPTIONS, model=str(alone))
    with files_at_hand([folder / "coffee.png"], store=store, options=encoder_options(store, asked)) as files:
        assert files.encoded == 1
        session = session_over(files, asked)
        assert session.encoder_check == "note"
        assert session.answer(str(folder / "coffee.png"), "What is it?").tokens


def test_a_name_that_was_not_given(folder, fake):
    with files_at_hand([folder / "coffee.png"]) as files, pytest.raises(KeyError):
        files["chelsea.png"]
