"""The pipeline and the album's life: bad pictures, what is new, deaths, disks, two runs at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_process
from PIL import Image

from qvsplit import store, vision
from qvsplit.album import open_album
from qvsplit.errors import AlbumDamaged, AlbumInUse, ModelError, PictureError, RecipeError, UsageError
from qvsplit.extract import Settings, Watcher, extract_pictures
from qvsplit.language import as_tensor
from qvsplit.lock import LOCK_FILE
from qvsplit.recipe import Recipe

OLD = (1_600_000_000, 1_600_000_000)


@pytest.fixture
def extract(checkpoint, tmp_path):
    """Run on `photos` into `embeds`, both below tmp_path; gives the summary, with failures heard on `.heard`."""

    def run(*paths, out=tmp_path / "embeds", **settings):
        heard: list[tuple[str, str]] = []
        settings.setdefault("model", str(checkpoint))
        watcher = Watcher(on_failure=lambda path, reason: heard.append((path, reason)))
        summary = extract_pictures(list(paths), out=out, settings=Settings(**settings), watcher=watcher)
        summary.heard = heard
        return summary

    return run


def contents(folder: Path) -> dict[str, tuple]:
    """What an album holds: path → status, grid, and the embeddings' bytes."""
    album = open_album(folder)
    return {
        row.path: (row.status, row.grid_thw, album.embeds(row).raw.tobytes() if row.status == "ok" else None)
        for row in album.rows
    }


# ---------------------------------------------------------------------------------------------------- bad pictures


def test_a_bad_picture_becomes_a_failed_row_and_stops_nothing(extract, some_photos, tmp_path):
    (some_photos / "text.png").write_text("this is no picture")
    (some_photos / "empty.jpg").touch()
    (some_photos / "cut.jpg").write_bytes((some_photos / "rocket.jpg").read_bytes()[:5000])
    Image.new("RGB", (2010, 10)).save(some_photos / "slim.png")
    os.mkfifo(some_photos / "pipe.png")
    summary = extract(some_photos)
    assert (summary.encoded, summary.failed, summary.failed_again) == (4, 5, 0)
    rows = {row.path: row for row in open_album(tmp_path / "embeds").rows}
    reasons = {name: rows[name].error for name in ("text.png", "empty.jpg", "cut.jpg", "slim.png", "pipe.png")}
    assert reasons == {
        "text.png": "is not a picture that can be read (by its content, whatever its name)",
        "empty.jpg": "is empty (0 bytes)",
        "cut.jpg": reasons["cut.jpg"],
        "slim.png": "is 2010×10, slimmer than 1:200, which the model's processor refuses",
        "pipe.png": "is not a regular file",
    }
    assert reasons["cut.jpg"] == "is a JPEG file that is cut off or damaged"
    assert sorted(name for name, _ in summary.heard) == sorted(reasons)
    assert all(rows[name].status == "failed" for name in reasons)


def test_only_bad_pictures_still_make_an_album(extract, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    assert extract(tmp_path / "a.png").failed == 1
    assert [row.status for row in open_album(tmp_path / "embeds").rows] == ["failed"]


def test_what_failed_is_not_tried_again_until_it_changes_or_is_asked_for(extract, some_photos):
    (some_photos / "bad.png").write_text("no picture")
    os.utime(some_photos / "bad.png", OLD)
    assert extract(some_photos).failed == 1
    assert extract(some_photos).to_do == 0
    again = extract(some_photos, retry_failed=True)
    assert (again.to_do, again.failed, again.failed_again, again.shards) == (1, 0, 1, 0)
    shutil.copyfile(some_photos / "coffee.png", some_photos / "bad.png")
    assert (mended := extract(some_photos)).failed == 0
    assert (mended.copied, mended.encoded) == (1, 0)


class OutOfMemory:
    """Stands in for the tower: runs out of memory above `limit` patches."""

    def __init__(self, real, limit):
        self.real, self.limit, self.batches = real, limit, []

    def __call__(self, batch):
        patches = sum(p.count for p in batch)
        self.batches.append(len(batch))
        if patches > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.real(batch)


def test_out_of_memory_halves_the_batch_and_in_the_end_sets_one_picture_aside(
    extract, some_photos, monkeypatch, tmp_path
):
    real_load = vision.load
    stand_ins = []

    def load(*args, **kwargs):
        half = real_load(*args, **kwargs)
        stand_ins.append(OutOfMemory(half._forward, 1000))
        monkeypatch.setattr(half, "_forward", stand_ins[-1])
        return half

    monkeypatch.setattr(vision, "load", load)
    summary = extract(some_photos, patch_budget=100_000)
    rows = {row.path: row for row in open_album(tmp_path / "embeds").rows}
    failed = {name for name, row in rows.items() if row.status == "failed"}
    sizes = {p.name: Image.open(p).size for p in some_photos.iterdir()}
    assert failed == {name for name, (w, h) in sizes.items() if round(w / 28) * round(h / 28) * 4 > 1000}
    assert 0 < len(failed) < 4
    assert all("needs more memory" in (rows[name].error or "") for name in failed)
    assert summary.encoded == 4 - len(failed)
    assert stand_ins[0].batches[:2] == [4, 2]


def test_rows_that_are_not_finite_are_never_written(extract, some_photos, monkeypatch, tmp_path):
    real = vision.Vision._forward

    def spoiled(self, batch):
        rows = [one.clone() for one in real(self, batch)]
        rows[0][3, 5] = float("nan")
        return rows

    monkeypatch.setattr(vision.Vision, "_forward", spoiled)
    assert extract(some_photos, patch_budget=100_000).failed == 1
    failed = [row for row in open_album(tmp_path / "embeds").rows if row.status == "failed"]
    assert [row.error for row in failed] == ["the tower gave values that are not finite in float32"]


def test_values_beyond_the_stored_dtype_are_never_written(extract, some_photos, monkeypatch, tmp_path):
    real = vision.Vision._forward
    monkeypatch.setattr(vision.Vision, "_forward", lambda self, batch: [one * 1e6 for one in real(self, batch)])
    assert extract(some_photos, store="float16").failed == 4
    assert {row.error for row in open_album(tmp_path / "embeds").rows} == {"has values beyond the range of float16"}


def test_memory_of_a_failed_forward_is_free_before_its_halves_run(extract, some_photos, monkeypatch):
    """Else a picture that fits alone would not fit beside what is left of the batch that did not."""
    alive: list[weakref.ref] = []
    seen: list[int] = []
    real = vision.Vision._forward

    class Activations:
        pass

    def forward(self, batch):
        held = Activations()
        seen.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(held))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)

    monkeypatch.setattr(vision.Vision, "_forward", forward)
    assert extract(some_photos, patch_budget=100_000).encoded == 4
    assert len(seen) == 7
    assert set(seen) == {0}


# ---------------------------------------------------------------------------------------------------- what is new


def test_a_second_run_has_nothing_to_do_and_writes_nothing(extract, some_photos, tmp_path):
    extract(some_photos)
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in (tmp_path / "embeds").glob("*.parquet")}
    summary = extract(some_photos, model=None)
    assert (summary.skipped, summary.to_do, summary.encoded, summary.shards) == (4, 0, 0, 0)
    assert {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in (tmp_path / "embeds").glob("*.parquet")} == before


def test_only_what_is_new_or_changed_is_encoded(extract, some_photos, tmp_path, photos):
    extract(some_photos)
    shutil.copyfile(photos / "astronaut.png", some_photos / "new.png")
    shutil.copyfile(photos / "color.png", some_photos / "coins.png")
    summary = extract(some_photos)
    assert (summary.encoded, summary.skipped) == (2, 3)
    fresh = extract(some_photos, out=tmp_path / "fresh")
    assert fresh.encoded == 5
    assert contents(tmp_path / "embeds").keys() == contents(tmp_path / "fresh").keys()
    assert open_album(tmp_path / "embeds").current(str(some_photos), "coins.png").width == 371


def test_a_copy_is_encoded_once_stored_once_and_readable_by_either_name(extract, some_photos, tmp_path):
    shutil.copyfile(some_photos / "coffee.png", some_photos / "z_copy.png")
    summary = extract(some_photos)
    assert (summary.encoded, summary.copied) == (4, 1)
    held = contents(tmp_path / "embeds")
    assert held["z_copy.png"] == held["coffee.png"]
    album = open_album(tmp_path / "embeds")
    assert [row.has_embeds for row in album.rows if row.path in {"coffee.png", "z_copy.png"}] == [True, False]
    shutil.copyfile(some_photos / "coffee.png", some_photos / "later.png")
    assert (again := extract(some_photos)).copied == 1
    assert again.encoded == 0
    assert contents(tmp_path / "embeds")["later.png"] == held["coffee.png"]


def test_a_moved_file_is_not_encoded_again_and_its_old_name_is_gone(extract, some_photos, tmp_path):
    extract(some_photos)
    held = contents(tmp_path / "embeds")["coffee.png"]
    (some_photos / "coffee.png").rename(some_photos / "tea.png")
    summary = extract(some_photos)
    assert (summary.moved, summary.encoded, summary.copied, summary.missing) == (1, 0, 0, 0)
    now = contents(tmp_path / "embeds")
    assert now["tea.png"] == held
    assert now["coffee.png"][0] == "gone"


def test_a_deleted_file_is_told_and_gone_only_with_prune(extract, some_photos, tmp_path):
    extract(some_photos)
    (some_photos / "coffee.png").unlink()
    assert extract(some_photos).missing == 1
    assert len(open_album(tmp_path / "embeds")) == 4
    assert extract(some_photos, prune=True).gone == 1
    assert len(open_album(tmp_path / "embeds")) == 3
    assert extract(some_photos, prune=True).gone == 0


def test_a_touched_file_is_read_once_more_and_then_known(extract, some_photos):
    extract(some_photos)
    os.utime(some_photos / "coffee.png", (1_600_000_500, 1_600_000_500))
    first = extract(some_photos)
    assert (first.to_do, first.encoded, first.touched, first.skipped) == (1, 0, 1, 3)
    assert extract(some_photos).to_do == 0


def test_embeddings_lost_with_a_shard_are_made_anew(extract, some_photos, tmp_path):
    extract(some_photos)
    held = contents(tmp_path / "embeds")
    shutil.copyfile(some_photos / "coffee.png", some_photos / "copy.png")
    extract(some_photos)
    (tmp_path / "embeds" / "shard-000001.parquet").unlink()
    with pytest.raises(AlbumDamaged, match="embeddings of copy"):
        contents(tmp_path / "embeds")
    summary = extract(some_photos)
    assert summary.encoded == 4
    now = contents(tmp_path / "embeds")
    assert {name: now[name][:2] for name in held} == {name: held[name][:2] for name in held}
    assert now["copy.png"] == now["coffee.png"]


@pytest.mark.parametrize("change", ["move", "touch"])
def test_so_are_those_that_only_old_rows_point_to(extract, some_photos, tmp_path, change):
    extract(some_photos)
    if change == "move":
        (some_photos / "coffee.png").rename(some_photos / "tea.png")
    else:
        os.utime(some_photos / "coffee.png", (1_600_000_500, 1_600_000_500))
    extract(some_photos)
    (tmp_path / "embeds" / "shard-000001.parquet").unlink()
    assert extract(some_photos).encoded == 4
    assert len(contents(tmp_path / "embeds")) == 4 + (change == "move")


def test_a_picture_that_could_not_be_opened_is_tried_again_and_nothing_of_it_is_lost(
    extract, some_photos, tmp_path, monkeypatch
):
    """A network folder that hiccups must not cost the album a picture."""
    extract(some_photos)
    before = contents(tmp_path / "embeds")
    for file in some_photos.iterdir():
        os.utime(file, (1_600_000_500, 1_600_000_500))

    def stale(decoder, found, on_file, may):
        raise PictureError("cannot be read: Stale file handle")

    with monkeypatch.context() as broken:
        broken.setattr("qvsplit.decoder.Decoder.look", stale)
        assert extract(some_photos).failed == 4
        again = extract(some_photos)
        assert (again.failed, again.failed_again, again.shards) == (0, 4, 0)
    healed = extract(some_photos)
    assert (healed.encoded, healed.to_do) == (0, 4)
    assert contents(tmp_path / "embeds") == before
    assert extract(some_photos).to_do == 0


def test_a_move_between_two_roots_and_an_emptied_root(extract, tmp_path, photos):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    shutil.copyfile(photos / "coins.png", tmp_path / "a" / "coins.png")
    shutil.copyfile(photos / "coffee.png", tmp_path / "b" / "coffee.png")
    extract(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a" / "coins.png").rename(tmp_path / "b" / "coins.png")
    summary = extract(tmp_path / "a", tmp_path / "b")
    assert (summary.moved, summary.copied, summary.encoded, summary.missing) == (0, 1, 0, 0)  # a may not be mounted
    assert extract(tmp_path / "a", tmp_path / "b", prune=True).gone == 0
    shutil.copyfile(photos / "color.png", tmp_path / "a" / "color.png")
    assert extract(tmp_path / "a", tmp_path / "b", prune=True).gone == 1  # it is: what is missing there is gone
    (tmp_path / "b" / "coins.png").rename(tmp_path / "a" / "coins 2.png")
    summary = extract(tmp_path / "a", tmp_path / "b")
    assert (summary.moved, summary.copied, summary.encoded, summary.missing) == (1, 0, 0, 0)
    assert [(Path(row.root).name, row.path) for row in open_album(tmp_path / "embeds")] == [
        ("a", "coins 2.png"),
        ("a", "color.png"),
        ("b", "coffee.png"),
    ]


def test_a_move_cut_short_between_its_rows_heals(extract, some_photos, tmp_path, monkeypatch):
    """The old name's row comes first: what dies in between leaves the new name new."""
    from qvsplit import extract as pipeline

    extract(some_photos)
    (some_photos / "coffee.png").rename(some_photos / "tea.png")
    real, rows = pipeline._Run._write, []

    def cut(self, row, raw):
        rows.append((row.path, row.status))
        if len(rows) == 2:
            raise KeyboardInterrupt
        real(self, row, raw)

    with monkeypatch.context() as broken:
        broken.setattr(pipeline._Run, "_write", cut)
        with pytest.raises(KeyboardInterrupt):
            extract(some_photos)
    assert rows == [("coffee.png", "gone"), ("tea.png", "ok")]
    extract(some_photos)
    now = contents(tmp_path / "embeds")
    assert (now["coffee.png"][0], now["tea.png"][0]) == ("gone", "ok")


def test_another_model_is_refused_even_with_nothing_to_do(extract, some_photos, tmp_path):
    from make_checkpoint import make_tiny

    extract(some_photos)
    make_tiny(tmp_path / "other", seed=1)
    for dry in (False, True):
        with pytest.raises(RecipeError, match="another tower"):
            extract(some_photos, model=str(tmp_path / "other"), dry_run=dry)
    shutil.copytree(open_album(tmp_path / "embeds").made.model, tmp_path / "same")
    assert extract(some_photos, model=str(tmp_path / "same")).skipped == 4


def test_a_folder_is_not_its_own_album(extract, some_photos):
    with pytest.raises(UsageError, match="is itself the folder of pictures"):
        extract(some_photos, out=some_photos)


def test_an_album_may_have_more_shards_than_a_process_may_have_open_files(extract, some_photos, tmp_path):
    extract(some_photos)
    first = tmp_path / "embeds" / "shard-000001.parquet"
    for number in range(2, 200):
        shutil.copyfile(first, first.with_name(f"shard-{number:06d}.parquet"))
    command = f"ulimit -n 64; {sys.executable} -m qvsplit inspect {tmp_path / 'embeds'} --json"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert json.loads(done.stdout)["shards"] == 199, done.stderr


def test_the_albums_own_settings_are_the_default_and_others_are_refused(extract, some_photos, tmp_path, checkpoint):
    extract(some_photos, max_pixels=100_000, store="bfloat16")
    shutil.copyfile(some_photos / "coffee.png", some_photos / "more.png")
    (some_photos / "more.png").write_bytes((some_photos / "more.png").read_bytes() + b"\0")
    assert extract(some_photos, model=None).encoded == 1
    for changes, said in (
        ({"max_pixels": 200_000}, "--max-pixels 200000 instead of 100000"),
        ({"store": "float16"}, "--store"),
    ):
        with pytest.raises(RecipeError, match=said):
            extract(some_photos, **changes)


def test_another_tower_is_refused_before_anything_is_written(extract, some_photos, tmp_path):
    from make_checkpoint import make_tiny

    extract(some_photos)
    before = contents(tmp_path / "embeds")
    shutil.copyfile(some_photos / "coffee.png", some_photos / "new.png")
    (some_photos / "new.png").write_bytes((some_photos / "new.png").read_bytes() + b"\0")
    make_tiny(tmp_path / "other", seed=1)
    with pytest.raises(RecipeError, match="tower"):
        extract(some_photos, model=str(tmp_path / "other"))
    assert contents(tmp_path / "embeds") == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"dtype": "float8"}, "--dtype float8"), ({"store": "int4"}, "--store int4"), ({"workers": 0}, "--workers"),
     ({"device": "abacus"}, "--device abacus"), ({"min_pixels": 10**6, "max_pixels": 10**5}, "--min-pixels"),
     ({"max_pixels": 100}, "--max-pixels must be at least 784"), ({"max_pixels": 0}, "--max-pixels must be"),
     ({"min_pixels": 0}, "--min-pixels at least 1")],
)  # fmt: skip
def test_settings_that_cannot_be(extract, some_photos, settings, said):
    with pytest.raises(UsageError, match=said):
        extract(some_photos, **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(extract, some_photos):
    with pytest.raises(UsageError, match="sees no CUDA device"):
        extract(some_photos, device="cuda")


def test_batches_are_filled_by_patches(extract, some_photos, monkeypatch):
    batches = []
    real = vision.Vision.encode
    monkeypatch.setattr(vision.Vision, "encode", lambda s, b: (batches.append([p.count for p in b]), real(s, b))[1])
    extract(some_photos, patch_budget=2500)
    assert all(sum(batch) <= 2500 or len(batch) == 1 for batch in batches)
    assert max(len(batch) for batch in batches) > 1
    assert sum(map(len, batches)) == 4


def test_a_dry_run_changes_nothing(extract, some_photos, tmp_path):
    summary = extract(some_photos, dry_run=True)
    assert (summary.to_do, summary.found) == (4, 4)
    assert not (tmp_path / "embeds").exists()


def test_an_album_inside_the_photos_is_not_walked(extract, some_photos):
    extract(some_photos, out=some_photos / "embeds")
    assert extract(some_photos, out=some_photos / "embeds").found == 4


# --------------------------------------------------------------------------------------- deaths, disks, two at once


def many_photos(folder: Path, photos: Path, number: int) -> Path:
    folder.mkdir()
    with Image.open(photos / "rocket.jpg") as image:
        for i in range(number):
            image.crop((i, 0, i + 500, 400)).save(folder / f"{i:04d}.jpg")
            os.utime(folder / f"{i:04d}.jpg", OLD)
    return folder


def start(*words, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "qvsplit", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


SLOW = "import time, qvsplit.vision as v; r = v.Vision.encode; v.Vision.encode = lambda s, b: (time.sleep(0.1), r(s, b))[1]"


def start_slowly(*words, seconds_a_shard: float = 300.0) -> subprocess.Popen:
    """The command with a tower that takes a tenth of a second longer a batch, so that it can be met at work."""
    code = f"import sys\n{SLOW}\nimport qvsplit.extract as e\ne.SHARD_SECONDS = {seconds_a_shard}\n"
    code += f"from qvsplit.cli import main\nsys.argv = {['qvsplit', *map(str, words)]!r}\nmain()"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_keeps_what_is_finished_and_the_next_run_ends_it(
    tmp_path, photos, checkpoint, extract, number, code
):
    folder, out = many_photos(tmp_path / "photos", photos, 60), tmp_path / "embeds"
    words = ["extract", folder, "--out", out, "--model", checkpoint, "--patch-budget", 1, "--json"]
    process = start_slowly(*words, seconds_a_shard=0.5)
    wait_for(lambda: len(list(out.glob("shard-*.parquet"))) >= 2, process)
    process.send_signal(number)
    began = time.monotonic()
    told, said = process.communicate(timeout=60)
    assert time.monotonic() - began < 5
    assert process.returncode == code, said
    assert "Traceback" not in said
    summary = json.loads(told)
    assert summary["interrupted"] is True
    assert 0 < summary["encoded"] < 60
    assert len(open_album(out)) == summary["encoded"]
    rest = extract(folder, patch_budget=1)
    assert rest.encoded == 60 - summary["encoded"]
    extract(folder, out=tmp_path / "uninterrupted", patch_budget=1)
    assert contents(out) == contents(tmp_path / "uninterrupted")


@pytest.mark.parametrize("seconds", [0.2, 1.2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_an_interrupt_while_libraries_are_imported_is_not_lost(
    tmp_path, some_photos, checkpoint, seconds, number, code
):
    """An exception raised by a signal is dropped where it meets a callback or a destructor; imports are full of them."""
    process = start("extract", some_photos, "--model", checkpoint, "--out", tmp_path / "embeds")
    wait_for((tmp_path / "embeds" / LOCK_FILE).exists, process)
    time.sleep(seconds)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code, said
    *summary, last = said.splitlines()  # there is one once the pictures were being read
    assert last == "qvsplit: interrupted"
    assert len(summary) <= 1 and all("4 left" in line for line in summary)


def test_a_killed_run_loses_at_most_the_shard_in_hand(tmp_path, photos, checkpoint, extract):
    folder, out = many_photos(tmp_path / "photos", photos, 60), tmp_path / "embeds"
    words = ["extract", folder, "--out", out, "--model", checkpoint, "--patch-budget", 1]
    process = start_slowly(*words, seconds_a_shard=0.5)
    wait_for(lambda: len(list(out.glob("shard-*.parquet"))) >= 3, process)
    wait_for(lambda: list(out.glob(".shard-*.tmp")), process)
    process.kill()
    process.communicate(timeout=60)
    survived = len(open_album(out))
    assert survived > 0
    assert list(out.glob(".shard-*.tmp"))
    assert extract(folder, patch_budget=1).encoded == 60 - survived
    assert not list(out.glob(".*.tmp"))
    extract(folder, out=tmp_path / "uninterrupted", patch_budget=1)
    assert contents(out) == contents(tmp_path / "uninterrupted")


def test_a_second_writer_is_told_who_holds_the_album_and_readers_do_not_wait(tmp_path, photos, checkpoint, extract):
    folder, out = many_photos(tmp_path / "photos", photos, 60), tmp_path / "embeds"
    process = start_slowly(
        "extract", folder, "--out", out, "--model", checkpoint, "--patch-budget", 1, seconds_a_shard=0.5
    )
    wait_for(lambda: list(out.glob("shard-*.parquet")), process)
    assert (out / LOCK_FILE).exists()
    with pytest.raises(AlbumInUse, match=f"process {process.pid} on "):
        extract(folder)
    assert len(open_album(out)) > 0
    process.kill()
    process.communicate(timeout=60)
    assert extract(folder).encoded > 0  # the kernel freed the lock


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_keeps_finished_shards_and_exits_7(tmp_path, photos, checkpoint):
    folder = many_photos(tmp_path / "photos", photos, 40)
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        out = disk / "embeds"
        process = start_slowly(
            "extract", folder, "--out", out, "--model", checkpoint, "--patch-budget", 1, seconds_a_shard=0.4
        )
        _, said = process.communicate(timeout=120)
        assert process.returncode == 7, said
        assert "the disk is full" in said
        assert "Traceback" not in said
        assert len(said.strip().splitlines()) == 1
        held = len(open_album(out))
        assert 0 < held < 40
        assert not list(out.glob(".*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        done = run_process("extract", folder, "--out", out, "--json")
        assert json.loads(done.stdout)["encoded"] == 40 - held, done.stderr
    finally:
        subprocess.run(["umount", disk], check=True)


def test_rows_that_met_a_full_disk_are_not_half_kept(extract, some_photos, tmp_path, monkeypatch):
    """A write that failed may have left anything in the file: that shard never appears."""
    from qvsplit.errors import DiskError
    from qvsplit.store import ShardWriter

    real, calls = ShardWriter._flush, []

    def flush(self):
        calls.append(self.rows)
        if len(calls) == 1:
            self._group = []
            raise DiskError("the disk is full")
        real(self)

    with monkeypatch.context() as broken:
        broken.setattr(ShardWriter, "_flush", flush)
        with pytest.raises(DiskError):
            extract(some_photos)
    assert list((tmp_path / "embeds").glob("*shard*")) == []
    assert extract(some_photos).encoded == 4


def test_two_workers_or_many_give_the_same_album(extract, some_photos, tmp_path):
    extract(some_photos, workers=1, patch_budget=1)
    extract(some_photos, workers=7, patch_budget=1, out=tmp_path / "seven")
    assert contents(tmp_path / "embeds") == contents(tmp_path / "seven")


def test_another_batching_differs_by_float_rounding_only(extract, some_photos, tmp_path):
    extract(some_photos, patch_budget=1)
    extract(some_photos, patch_budget=10**6, out=tmp_path / "together")
    one, other = open_album(tmp_path / "embeds"), open_album(tmp_path / "together")
    for row in one:
        np.testing.assert_allclose(
            one.embeds(row).numpy(), other.embeds(other.current(*row.key)).numpy(), rtol=1e-5, atol=1e-5
        )


# ----------------------------------------------------------------------------------- forward passes, lanes, dtypes


def test_two_workers_make_the_album_that_one_makes(extract, photos, tmp_path):
    """Row for row, in the same order: whatever worker a batch went to, and whichever was done first."""
    one = extract(photos, out=tmp_path / "one", device="cpu", patch_budget=1)
    two = extract(photos, out=tmp_path / "two", device="cpu,cpu", patch_budget=1)
    assert (two.encoded, two.copied, two.failed) == (one.encoded, one.copied, one.failed)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    orders = [
        [row.path for shard in open_album(tmp_path / name).shards for row in shard.rows if row.has_embeds]
        for name in ("one", "two")
    ]
    assert orders[0] == orders[1]


def test_two_workers_work_at_the_same_time(extract, some_photos, monkeypatch, tmp_path):
    both = threading.Barrier(2, timeout=60)
    real, waited = vision.Vision.encode, []

    def encode(self, batch):
        if len(waited) < 2:
            waited.append(both.wait())
        return real(self, batch)

    monkeypatch.setattr(vision.Vision, "encode", encode)
    assert extract(some_photos, device="cpu,cpu", patch_budget=1).encoded == 4
    assert len(waited) == 2


def test_what_fails_in_a_worker_stops_the_run_and_keeps_what_was_written(extract, some_photos, monkeypatch, tmp_path):
    real, calls = vision.Vision.encode, []

    def encode(self, batch):
        calls.append(1)
        if len(calls) == 3:
            raise ModelError("the tower is broken")
        return real(self, batch)

    monkeypatch.setattr(vision.Vision, "encode", encode)
    with pytest.raises(ModelError, match="broken"):
        extract(some_photos, patch_budget=1)
    assert len(open_album(tmp_path / "embeds")) == 2


def test_rows_are_written_while_the_tower_computes(extract, some_photos, monkeypatch, tmp_path):
    """The first batch's rows are stored before the third leaves the tower."""
    written = threading.Event()
    real_encode, real_add, calls = vision.Vision.encode, store.ShardWriter.add, []

    def encode(self, batch):
        calls.append(1)
        if len(calls) == 3:
            assert written.wait(60)
        return real_encode(self, batch)

    def add(self, row, raw):
        real_add(self, row, raw)
        written.set()

    monkeypatch.setattr(vision.Vision, "encode", encode)
    monkeypatch.setattr(store.ShardWriter, "add", add)
    assert extract(some_photos, patch_budget=1).encoded == 4


def test_an_interrupt_keeps_what_had_left_the_tower(checkpoint, some_photos, tmp_path):
    """The second batch is done, though not yet written, while the first is told."""

    def on_picture(path):
        time.sleep(1)
        raise KeyboardInterrupt

    settings = Settings(model=str(checkpoint), patch_budget=1)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        extract_pictures(
            [some_photos], out=tmp_path / "embeds", settings=settings, watcher=Watcher(on_picture=on_picture)
        )
    assert len(open_album(tmp_path / "embeds")) == interrupt.value.qvsplit_summary.encoded == 2


def test_the_same_bytes_twice_are_encoded_once_also_while_they_are_in_the_tower(extract, some_photos, tmp_path):
    names = sorted(path.name for path in some_photos.iterdir())
    shutil.copyfile(some_photos / names[0], some_photos / (names[0] + ".copy.png"))
    shutil.copyfile(some_photos / names[0], some_photos / "zz.png")
    summary = extract(some_photos, patch_budget=1)
    assert (summary.encoded, summary.copied) == (4, 2)


def test_an_album_keeps_its_forward_pass(extract, some_photos, photos, tmp_path):
    """The recipe names it: what was made by transformers' own goes on so, to the bit."""
    extract(some_photos, kernels="reference", patch_budget=1)
    assert open_album(tmp_path / "embeds").recipe.kernels == "reference"
    shutil.copyfile(photos / "page.png", some_photos / "page.png")
    extract(some_photos)
    extract(some_photos, out=tmp_path / "anew", kernels="reference", patch_budget=1)
    assert contents(tmp_path / "embeds") == contents(tmp_path / "anew")
    with pytest.raises(RecipeError, match="--kernels fused instead of reference"):
        extract(some_photos, kernels="fused")
    with pytest.raises(UsageError, match="--kernels quick: choose one of fused, reference"):
        extract(some_photos, kernels="quick")
    extract(some_photos, rebuild=True, kernels="fused")
    assert open_album(tmp_path / "embeds").recipe.kernels == "fused"


def test_a_recipe_that_names_no_forward_pass_is_of_the_reference(extract, some_photos, tmp_path):
    extract(some_photos)
    told = open_album(tmp_path / "embeds").recipe.to_json()
    assert told.pop("kernels") == "fused"
    assert Recipe.from_json(told, "x").kernels == "reference"
    with pytest.raises(AlbumDamaged):
        Recipe.from_json(told | {"kernels": "magic"}, "x")


def test_int8_is_near_what_was_computed_and_goes_on_as_int8(extract, some_photos, photos, tmp_path, run_cli):
    extract(some_photos, out=tmp_path / "exact")
    extract(some_photos, out=tmp_path / "small", store="int8")
    shutil.copyfile(photos / "page.png", some_photos / "page.png")
    for name in ("exact", "small"):
        assert extract(some_photos, out=tmp_path / name).encoded == 1
    exact, small = (open_album(tmp_path / name) for name in ("exact", "small"))
    assert (small.recipe.stored_dtype, small.recipe.compute_dtype) == ("int8", "float32")
    for row in exact:
        one, other = exact.embeds(row).numpy(), small.embeds(small.current(*row.key)).numpy()
        scale = np.abs(one).max(axis=1, keepdims=True) / 127
        assert (np.abs(one - other) <= scale * 0.501).all()
        assert torch.equal(as_tensor(small.embeds(row)), torch.from_numpy(other))
    before = contents(tmp_path / "small")
    assert run_cli("compact", tmp_path / "small")[0] == 0
    assert contents(tmp_path / "small") == before


def test_verify_takes_int8_for_what_it_is(extract, some_photos, tmp_path, run_cli):
    extract(some_photos, model="demo", store="int8")
    code, out, err = run_cli("verify", tmp_path / "embeds", "--sample", 2)
    assert code == 0, err
    assert out.count("of the largest value, same tokens") == 2


def test_every_stage_is_clocked(extract, some_photos):
    stages = extract(some_photos, patch_budget=1).stages
    assert {"scan", "read and decode", "preprocess", "load", "forward", "copy", "store", "wait for the tower",
            "wait for pictures", "tower idle", "load libraries", "load processor", "load weights", "prepare weights"} == stages.keys()  # fmt: skip
    assert all(seconds >= 0 for seconds in stages.values())
    assert stages["forward"] > 0


def test_the_summary_tells_the_budget(extract, some_photos):
    assert extract(some_photos, patch_budget=300).patch_budget == 300
