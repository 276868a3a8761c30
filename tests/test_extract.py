"""The public call: what is new and what is not, what is written, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from qvsplit.errors import ConfigError, ItemError, StoreDamaged, UsageError
from qvsplit.extract import extract_files
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.store.opening import open_store
from qvsplit.store.store_writer import StoreWriter
from tests.support.checkpoints import make_tiny
from tests.support.extracting import LATER, PHOTOS, add, add_bad, by_path, contents, extractor, state
from tests.support.fake_encoder import FakeEncoder
from tests.support.fake_source import InThreadDecoders

# ---------------------------------------------------------------------------------------------------- bad images


def test_a_bad_image_becomes_a_failed_row_and_stops_nothing(extract_with_model, some_photos, out):
    (some_photos / "text.png").write_text("this is no image")
    (some_photos / "empty.jpg").touch()
    (some_photos / "cut.jpg").write_bytes((some_photos / "rocket.jpg").read_bytes()[:5000])
    Image.new("RGB", (2010, 10)).save(some_photos / "slim.png")
    os.mkfifo(some_photos / "pipe.png")
    ran = extract_with_model(some_photos)
    assert (ran.encoded, ran.failed, ran.failed_again) == (4, 5, 0)
    rows = {row.path: row for row in open_store(out).rows if row.status == "failed"}
    assert {name: row.error for name, row in rows.items()} == {
        "text.png": "is not an image or a video that can be read (by its content, whatever its name)",
        "empty.jpg": "is empty (0 bytes)",
        "cut.jpg": "is a JPEG file that is cut off or damaged",
        "slim.png": "is 2010×10, slimmer than 1:200, which the model's processor refuses",
        "pipe.png": "is not a regular file",
    }
    assert dict(ran.failures) == {name: row.error for name, row in rows.items()}
    assert {row.error_kind for row in rows.values()} == {"content"}


def test_only_bad_images_still_make_a_store(extract, tmp_path, out):
    add_bad(tmp_path, "a.png")
    assert extract(tmp_path / "a.png").failed == 1
    assert [row.status for row in open_store(out).rows] == ["failed"]


def test_what_failed_is_not_tried_again_until_it_changes_or_is_asked_for(extract, some_photos):
    add_bad(some_photos, "bad.png")
    assert extract(some_photos).failed == 1
    assert extract(some_photos).to_read == 0
    again = extract(some_photos, retry_failed=True)
    assert (again.to_read, again.failed, again.failed_again, again.shards) == (1, 0, 1, 0)
    assert again.failures == []
    shutil.copyfile(some_photos / "coffee.png", some_photos / "bad.png")
    cured = extract(some_photos)
    assert (cured.copied, cured.encoded, cured.failed) == (1, 0, 0)


def test_a_copy_of_what_the_encoder_refuses_fails_too(extract, tmp_path, out, monkeypatch):
    """It waits for the other's features, in the same batch."""
    add(tmp_path / "photos", "a.png")
    shutil.copy2(tmp_path / "photos" / "a.png", tmp_path / "photos" / "b.png")
    monkeypatch.setattr(FakeEncoder, "encode", lambda encoder, batch: [ItemError("is refused") for _ in batch])
    ran = extract(tmp_path / "photos")
    assert (ran.failed, ran.remaining) == (2, 0)
    assert dict(ran.failures) == {"a.png": "is refused", "b.png": "is refused"}
    assert extract(tmp_path / "photos").failed_before == 2


# ---------------------------------------------------------------------------------------------------- what is new


def test_a_second_run_has_nothing_to_do_and_writes_nothing(extract, some_photos, out):
    extract(some_photos)
    before = state(out)
    again = extract(some_photos, model=None)
    assert (again.unchanged, again.to_read, again.encoded, again.shards) == (4, 0, 0, 0)
    assert state(out) == before
    assert again.planned == [0]


def test_only_what_is_new_or_changed_is_encoded(extract, some_photos, tmp_path, out):
    extract(some_photos)
    shutil.copyfile(PHOTOS["astronaut.png"], some_photos / "new.png")
    shutil.copyfile(PHOTOS["color.png"], some_photos / "coins.png")
    ran = extract(some_photos)
    assert (ran.encoded, ran.new, ran.modified, ran.unchanged) == (2, 1, 1, 3)
    assert extract(some_photos, out=tmp_path / "fresh").encoded == 5
    assert contents(out) == contents(tmp_path / "fresh")
    assert open_store(out).current(str(some_photos), "coins.png").width == 371


def test_a_copy_is_encoded_once_stored_once_and_readable_by_either_name(extract, some_photos, out):
    shutil.copyfile(some_photos / "coffee.png", some_photos / "z_copy.png")
    ran = extract(some_photos)
    assert (ran.encoded, ran.copied) == (4, 1)
    held = by_path(out)
    assert held["z_copy.png"] == held["coffee.png"]
    rows = [row for row in open_store(out).rows if row.path in {"coffee.png", "z_copy.png"}]
    assert [row.has_features for row in rows] == [True, False]
    shutil.copyfile(some_photos / "coffee.png", some_photos / "later.png")
    again = extract(some_photos)
    assert (again.copied, again.encoded) == (1, 0)
    assert by_path(out)["later.png"] == held["coffee.png"]


def test_a_moved_file_is_not_encoded_again_and_its_old_name_is_deleted(extract, some_photos, out):
    extract(some_photos)
    held = by_path(out)["coffee.png"]
    (some_photos / "coffee.png").rename(some_photos / "tea.png")
    ran = extract(some_photos)
    assert (ran.moved, ran.encoded, ran.copied, ran.not_found) == (1, 0, 0, 0)
    now = by_path(out)
    assert now["tea.png"] == held
    assert now["coffee.png"][0] == "deleted"


def test_a_file_that_is_not_found_is_deleted_only_with_prune(extract, some_photos, out):
    extract(some_photos)
    (some_photos / "coffee.png").unlink()
    assert extract(some_photos).not_found == 1
    assert len(open_store(out)) == 4
    assert extract(some_photos, prune=True).deleted == 1
    assert len(open_store(out)) == 3
    assert extract(some_photos, prune=True).deleted == 0


def test_a_touched_file_is_read_once_more_and_then_known(extract, some_photos):
    extract(some_photos)
    os.utime(some_photos / "coffee.png", LATER)
    first = extract(some_photos)
    assert (first.to_read, first.encoded, first.metadata_changed, first.unchanged) == (1, 0, 1, 3)
    assert extract(some_photos).to_read == 0


def test_features_lost_with_a_shard_are_encoded_again(extract, some_photos, out):
    extract(some_photos)
    held = by_path(out)
    shutil.copyfile(some_photos / "coffee.png", some_photos / "copy.png")
    extract(some_photos)
    (out / "shard-000001.parquet").unlink()
    with pytest.raises(StoreDamaged, match="features of copy"):
        contents(out)
    assert extract(some_photos).encoded == 4
    now = by_path(out)
    assert {name: now[name] for name in held} == held
    assert now["copy.png"] == now["coffee.png"]


@pytest.mark.parametrize("change", ["move", "touch"])
def test_so_are_those_that_only_old_rows_point_to(extract, some_photos, out, change):
    extract(some_photos)
    if change == "move":
        (some_photos / "coffee.png").rename(some_photos / "tea.png")
    else:
        os.utime(some_photos / "coffee.png", LATER)
    extract(some_photos)
    (out / "shard-000001.parquet").unlink()
    assert extract(some_photos).encoded == 4
    assert len(contents(out)) == 4 + (change == "move")


def test_an_image_that_could_not_be_opened_is_tried_again_and_nothing_of_it_is_lost(
    extract, some_photos, out, monkeypatch
):
    """A network folder that hiccups must not cost the store an image."""
    extract(some_photos)
    before = contents(out)
    for file in some_photos.iterdir():
        os.utime(file, LATER)

    def stale(decoder, entry):
        raise ItemError("cannot be read: Stale file handle", "permission")

    with monkeypatch.context() as broken:
        broken.setattr(InThreadDecoders, "read", stale)
        assert extract(some_photos).failed == 4
        again = extract(some_photos)
        assert (again.failed, again.failed_again, again.shards) == (0, 4, 0)
    healed = extract(some_photos)
    assert (healed.encoded, healed.to_read) == (0, 4)
    assert contents(out) == before
    assert extract(some_photos).to_read == 0


def test_a_move_between_two_roots_and_an_emptied_root(extract, tmp_path, out):
    one, other = tmp_path / "a", tmp_path / "b"
    add(one, "coins.png", "coins.png")
    add(other, "coffee.png", "coffee.png")
    extract(one, other)
    (one / "coins.png").rename(other / "coins.png")
    ran = extract(one, other)
    assert (ran.moved, ran.copied, ran.encoded, ran.not_found) == (0, 1, 0, 0)  # `a` may not be mounted
    assert extract(one, other, prune=True).deleted == 0
    add(one, "color.png", "color.png")
    assert extract(one, other, prune=True).deleted == 1  # it is: what is missing there was deleted
    (other / "coins.png").rename(one / "coins 2.png")
    ran = extract(one, other)
    assert (ran.moved, ran.copied, ran.encoded, ran.not_found) == (1, 0, 0, 0)
    assert [(Path(row.root).name, row.path) for row in open_store(out)] == [
        ("a", "coins 2.png"),
        ("a", "color.png"),
        ("b", "coffee.png"),
    ]


def test_a_move_cut_short_between_its_rows_heals(extract, some_photos, out, monkeypatch):
    """The old name's row comes first: what dies in between leaves the new name new."""
    extract(some_photos)
    (some_photos / "coffee.png").rename(some_photos / "tea.png")
    real, rows = StoreWriter.append_item, []

    def cut(self, parts):
        parts = list(parts)
        rows.extend((row.path, row.status) for row, _ in parts)
        if len(rows) == 2:
            raise KeyboardInterrupt
        return real(self, parts)

    with monkeypatch.context() as broken:
        broken.setattr(StoreWriter, "append_item", cut)
        with pytest.raises(KeyboardInterrupt):
            extract(some_photos)
    assert rows == [("coffee.png", "deleted"), ("tea.png", "ok")]
    extract(some_photos)
    now = by_path(out)
    assert (now["coffee.png"][0], now["tea.png"][0]) == ("deleted", "ok")


def test_found_and_unchanged_are_counted_once_after_a_deletion(extract, tmp_path):
    """A folder that lists as before, with a row whose file does not exist, is looked into and not counted again."""
    for name in ("1.png", "2.png", "3.png"):
        add(tmp_path / "a", name, shift=ord(name[0]))
        add(tmp_path / "b", name, shift=2 * ord(name[0]))
    paths = (tmp_path / "a", tmp_path / "b")
    assert extract(*paths).new == 6
    (tmp_path / "a" / "1.png").unlink()
    deleted = extract(*paths)
    assert (deleted.found, deleted.unchanged, deleted.not_found) == (5, 5, 1)
    add(tmp_path / "b", "4.png")
    ran = extract(*paths)
    assert (ran.found, ran.unchanged, ran.new, ran.not_found) == (6, 5, 1, 1)
    last = extract(*paths)
    assert (last.found, last.unchanged, last.to_read, last.not_found) == (6, 6, 0, 1)


def test_each_run_that_writes_claims_a_generation_which_its_rows_carry(extract, some_photos, out):
    def claimed() -> list[str]:
        return sorted(path.name for path in (out / ".qvsplit" / "generations").iterdir())

    def generations() -> dict[str, int]:
        return {row.path: row.generation for row in open_store(out).rows}

    extract(some_photos, limit=2)
    assert set(generations().values()) == {1}
    assert claimed() == [f"{1:012d}"]
    extract(some_photos)
    assert sorted(generations().values()) == [1, 1, 2, 2]
    before = state(out)
    for _ in range(2):
        extract(some_photos)  # nothing to do
    assert state(out) == before
    (some_photos / "coins.png").rename(some_photos / "moved.png")
    os.utime(some_photos / "rocket.jpg", LATER)
    (some_photos / "coffee.png").unlink()
    extract(some_photos, prune=True)
    assert [generations()[name] for name in ("coins.png", "moved.png", "rocket.jpg", "coffee.png")] == [3, 3, 3, 3]
    assert claimed() == [f"{3:012d}"]


def test_what_may_not_be_pruned_is_nothing_to_write(extract, some_photos, out):
    """A folder that stays empty, below one that holds images: night after night with --prune."""
    add(some_photos, "disk/1.png")
    extract(some_photos)
    (some_photos / "disk" / "1.png").unlink()
    assert extract(some_photos, prune=True).not_found == 1
    before = state(out)
    assert extract(some_photos, prune=True).not_found == 1
    assert state(out) == before


# --------------------------------------------------------------------------------------------- what may be cured


@pytest.mark.parametrize("stage", ["read", "decode"])
def test_what_took_too_long_is_tried_again_once_it_may_take_longer(extract, some_photos, monkeypatch, stage):
    extract(some_photos)
    add(some_photos, "slow.png")

    def slow(decoders, entry, *more):
        if entry.path == "slow.png" and decoders.item_timeout < 100:
            raise ItemError(f"took longer than {decoders.item_timeout:g} s to read or decode", "timeout")
        return real(decoders, entry, *more)

    real = getattr(InThreadDecoders, stage)
    monkeypatch.setattr(InThreadDecoders, stage, slow)
    assert extract(some_photos, item_timeout=10.0).failed == 1
    for shorter in (10.0, 5.0):
        again = extract(some_photos, item_timeout=shorter)
        assert (again.to_read, again.failed_before) == (0, 1)
    again = extract(some_photos, item_timeout=50.0)
    assert (again.to_read, again.failed_again) == (1, 1)
    cured = extract(some_photos, item_timeout=100.0)
    assert (cured.to_read, cured.encoded) == (1, 1)
    assert extract(some_photos, item_timeout=10.0).to_read == 0


@pytest.mark.parametrize("kind", ["reader-missing", "content"])
def test_what_lacked_a_reader_is_tried_again_once_there_is_one(extract, some_photos, monkeypatch, kind):
    add_bad(some_photos, "x.heic")
    readers: list[str] = []
    monkeypatch.setattr("qvsplit.pipeline.view.optional_readers", lambda **_: tuple(readers))

    def decode(decoders, entry, info, on_size):
        if entry.path == "x.heic":
            if not readers:
                raise ItemError("is a HEIF image", kind)
            shutil.copyfile(PHOTOS["coins.png"], entry.file)
            return real(decoders, entry, decoders.read(entry), on_size)
        return real(decoders, entry, info, on_size)

    real = InThreadDecoders.decode
    monkeypatch.setattr(InThreadDecoders, "decode", decode)
    assert extract(some_photos).failed == 1
    assert extract(some_photos).to_read == 0
    readers.append("HEIF")
    cured = extract(some_photos)
    expected = (1, 1, 0) if kind == "reader-missing" else (0, 0, 1)
    assert (cured.to_read, cured.encoded, cured.failed_before) == expected


def test_what_may_not_be_opened_is_always_tried_again(extract, some_photos, monkeypatch):
    add(some_photos, "locked.png")

    def read(decoders, entry):
        if entry.path == "locked.png":
            raise ItemError("cannot be opened: Permission denied", "permission")
        return real(decoders, entry)

    real = InThreadDecoders.read
    with monkeypatch.context() as locked:
        locked.setattr(InThreadDecoders, "read", read)
        assert extract(some_photos).failed == 1
        assert extract(some_photos).failed_again == 1
    assert extract(some_photos).new == 0
    assert extract(some_photos).unchanged == 5


# -------------------------------------------------------------------------------------------------------- refusals


def test_another_model_is_refused_even_with_nothing_to_do(extract_with_model, some_photos, tmp_path, checkpoint):
    extract_with_model(some_photos)
    make_tiny(tmp_path / "other", seed=1)
    for change in ("nothing", "touch"):
        if change == "touch":  # it is read, and nothing need be encoded
            os.utime(some_photos / "coins.png", LATER)
        for dry in (False, True):
            with pytest.raises(ConfigError, match="another encoder"):
                extract_with_model(some_photos, model=str(tmp_path / "other"), dry_run=dry)
    shutil.copytree(checkpoint, tmp_path / "same")
    assert extract_with_model(some_photos, model=str(tmp_path / "same")).metadata_changed == 1
    assert extract_with_model(some_photos, model=str(tmp_path / "same")).unchanged == 4


def test_another_encoder_is_refused_before_anything_is_written(extract_with_model, some_photos, tmp_path, out):
    extract_with_model(some_photos)
    before = contents(out)
    add(some_photos, "new.png")
    make_tiny(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="encoder"):
        extract_with_model(some_photos, model=str(tmp_path / "other"))
    assert contents(out) == before


def test_a_folder_is_not_its_own_store(extract, some_photos):
    with pytest.raises(UsageError, match="is itself the folder of images"):
        extract(some_photos, out=some_photos)


def test_a_store_inside_the_photos_is_not_walked(extract, some_photos):
    extract(some_photos, out=some_photos / "embeds")
    assert extract(some_photos, out=some_photos / "embeds").found == 4


def test_the_stores_own_settings_are_the_default_and_others_are_refused(extract, some_photos, fake_model):
    extract(some_photos, max_pixels=100_000, storage_dtype="bfloat16")
    add(some_photos, "more.png")
    assert extract(some_photos, model=None).encoded == 1
    for changes, said in (
        ({"max_pixels": 200_000}, "`max_pixels` 200000 instead of 100000"),
        ({"storage_dtype": "float16"}, "`storage_dtype` float16 instead of bfloat16"),
        ({"kernels": "reference"}, "`kernels` reference instead of fused"),
    ):
        with pytest.raises(ConfigError, match=said):
            extract(some_photos, **changes)
    assert fake_model.loads == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [({"device": "abacus"}, "`device` abacus"), ({"min_pixels": 10**6, "max_pixels": 10**5}, "`min_pixels`"),
     ({"max_pixels": 100}, "`max_pixels` must be at least 784"), ({"max_pixels": 0}, "`max_pixels` must be"),
     ({"min_pixels": 0}, "`min_pixels` must be at least 1")],
)  # fmt: skip
def test_options_that_no_model_can_be_loaded_with(extract_with_model, tmp_path, options, said):
    add(tmp_path / "photos", "a.png")
    with pytest.raises(UsageError, match=said):
        extract_with_model(tmp_path / "photos", workers=1, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(extract_with_model, some_photos):
    with pytest.raises(UsageError, match="sees no CUDA device"):
        extract_with_model(some_photos, device="cuda")


def test_a_cpu_with_bfloat16_units_is_noted_once(some_photos, checkpoint, tmp_path, monkeypatch):
    """For a new store whose dtype nobody chose: another dtype is another config, and is not chosen silently."""
    make_tiny(tmp_path / "model", dtype="bfloat16")
    monkeypatch.setattr("qvsplit.models.encoder.LARGE_ENCODER_BYTES", 1000)
    monkeypatch.setattr("qvsplit.models.encoder.has_bfloat16_units", lambda: True)
    extract = extractor(str(tmp_path / "model"), tmp_path / "a")
    assert any("`dtype=bfloat16`" in line for line in extract(some_photos).notes)
    add(some_photos, "more.png")
    assert extract(some_photos).notes == []
    assert extract(some_photos, dtype="float32", out=tmp_path / "b").notes == []


# ------------------------------------------------------------------------------------------------------ the summary


def test_every_stage_is_clocked(extract_with_model, some_photos):
    ran = extract_with_model(some_photos, patch_budget=1)
    assert {"scan", "read and decode", "preprocess", "load", "forward", "copy", "store", "wait for the encoder",
            "wait for images", "encoder idle", "load libraries", "load processor", "load weights", "prepare weights"} == ran.stages.keys()  # fmt: skip
    assert all(seconds >= 0 for seconds in ran.stages.values())
    assert ran.stages["forward"] > 0
    assert ran.patch_budget == 1
    assert ran.encoder_bytes > 0
    assert ran.weights_bytes_read >= ran.encoder_bytes // 2
    assert ran.decoder_memory_bytes > 0
    assert ran.peak_memory_bytes > 0


def test_what_was_asked_for_and_what_came_of_it_add_up(extract, some_photos, out):
    add_bad(some_photos, "bad.png")
    ran = extract(some_photos, limit=3)
    assert ran.found == ran.unchanged + ran.failed_before + ran.to_read == 5
    assert ran.planned == [5]
    assert len(ran.done) == 3 == ran.encoded + ran.failed
    assert ran.remaining == 2
    assert (ran.store, ran.model) == (str(out), "fake")
    assert json.loads(json.dumps(ran.to_json()))["stopped"] == "limit"
    assert ran.bytes == sum(path.stat().st_size for path in out.glob("*.parquet"))


def test_a_store_may_have_more_shards_than_a_process_may_have_open_files(extract, some_photos, out):
    extract(some_photos)
    first = out / "shard-000001.parquet"
    for number in range(2, 200):
        shutil.copyfile(first, first.with_name(f"shard-{number:06d}.parquet"))
    command = f"ulimit -n 64; {sys.executable} -m qvsplit inspect {out} --json"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert json.loads(done.stdout)["shards"] == 199, done.stderr


def test_the_store_is_embeds_where_none_is_named(fake_model, some_photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert extract_files([some_photos], options=ExtractOptions(model="fake")).store == "embeds"
    assert len(open_store("embeds")) == 4
