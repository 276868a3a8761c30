"""Runs that end early: signals, kills, full disks, and two runs at once. bench/deaths.py has the long forms."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from qvsplit.errors import DiskError, ModelError, StoreInUse
from qvsplit.runtime import interrupts
from qvsplit.store import compact, layout
from qvsplit.store.opening import open_store
from qvsplit.store.storage import LocalStorage
from tests.support.extracting import OLD, add, contents, many, shards
from tests.support.fake_source import fake_video
from tests.support.forked import run_program, start_program
from tests.support.processes import run_process, start_process, start_python, start_slowly, stop_for, wait_for

LOCK = layout.LOCK
IMAGES = 24


def staged(out) -> list:
    return list((out / layout.STAGING).glob("*")) + list((out / layout.STAGING).glob(".*.tmp"))


# --------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_keeps_what_is_finished_and_the_next_run_ends_it(extract, tmp_path, out, number, code):
    folder = many(tmp_path / "photos", IMAGES)
    words = ["extract", folder, "--out", out, "--model", "fake", "--patch-budget", 1, "--json"]
    process = start_slowly(*words, seconds_a_shard=0.3, start=start_program)
    wait_for(lambda: len(shards(out)) >= 2, process)
    process.send_signal(number)
    began = time.monotonic()
    printed, said = process.communicate(timeout=60)
    assert time.monotonic() - began < 5
    assert process.returncode == code, said
    assert "Traceback" not in said
    summary = json.loads(printed)
    assert summary["interrupted"] is True
    assert 0 < summary["encoded"] < IMAGES
    assert len(open_store(out)) == summary["encoded"]
    assert not staged(out)
    rest = extract(folder, patch_budget=1)
    assert rest.encoded == IMAGES - summary["encoded"]
    extract(folder, out=tmp_path / "uninterrupted", patch_budget=1)
    assert contents(out) == contents(tmp_path / "uninterrupted")


@pytest.mark.parametrize(
    ("number", "code", "seconds"), [(signal.SIGINT, 130, 0.2), (signal.SIGTERM, 143, 1.0), (signal.SIGHUP, 143, 0.1)]
)
def test_an_interrupt_while_libraries_are_imported_is_not_lost(some_photos, checkpoint, out, number, code, seconds):
    """An exception raised by a signal is dropped where it meets a callback or a destructor; imports are full of them."""
    process = start_process("extract", some_photos, "--model", checkpoint, "--out", out)
    wait_for((out / LOCK).exists, process)
    time.sleep(seconds)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code, said
    *summary, last = said.splitlines()  # there is one once the images were being read
    assert last == "qvsplit: interrupted"
    assert len(summary) <= 1
    assert all("4 remaining" in line for line in summary)
    assert not out.exists()


def test_an_interrupt_keeps_what_had_left_the_encoder(extract, fake_model, some_photos, out):
    """The second batch is done, though not yet written, while the first is reported."""

    def on_item(path):
        end = time.monotonic() + 10
        while len(fake_model.batches) < 2 and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(0.2)
        raise KeyboardInterrupt

    fake_model.seconds = 0.05  # the second is behind the first
    with pytest.raises(KeyboardInterrupt):
        extract(some_photos, patch_budget=1, workers=4, on_item=on_item)
    (summary,) = extract.ended
    assert summary.interrupted
    assert len(open_store(out)) == summary.encoded == 2
    assert summary.remaining == 2
    assert extract(some_photos).encoded == 2


def test_an_interrupt_in_the_middle_of_a_row_counts_what_is_written(extract, some_photos, out, monkeypatch):
    """Signals wait until a row and its count are both there."""
    real, names = LocalStorage.put_whole, []

    def interrupted(storage, name, **how):
        if name != layout.WALKED:  # which folders there are is noted before any row
            names.append(name)
        if names == [name]:
            os.kill(os.getpid(), signal.SIGINT)
        return real(storage, name, **how)

    monkeypatch.setattr(LocalStorage, "put_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(some_photos, patch_budget=1)
    assert names[0] == layout.shard_name(1)
    (summary,) = extract.ended
    assert summary.encoded == len(open_store(out)) >= 1
    assert summary.encoded + summary.remaining == 4


def test_a_signal_that_was_lost_ends_the_run_behind_the_item_in_hand(extract, fake_model, tmp_path, out):
    """As one that is raised in a destructor. What has come out of the encoder is not to be encoded again."""
    folder = many(tmp_path / "photos", 3)
    fake_model.on_encode = lambda batch: interrupts._arrived.append(signal.SIGTERM)
    try:
        with pytest.raises(interrupts.Terminated):
            extract(folder, patch_budget=1000)
    finally:
        interrupts.clear()
    (summary,) = extract.ended
    assert summary.interrupted
    assert (summary.encoded, summary.remaining, len(open_store(out))) == (3, 0, 3)


@pytest.mark.parametrize(("seconds", "done"), [(0.0, False), (4.0, True)], ids=["not stopped", "stopped"])
def test_a_pause_is_no_runtime(tmp_path, out, seconds, done):
    """A run that is stopped, as by Ctrl-Z, for longer than it may take has all of its time left when it continues."""
    folder = many(tmp_path / "photos", 8)
    words = ["extract", folder, "--out", out, "--model", "fake", "--patch-budget", 1, "--workers", 1, "--json"]
    words += ["--max-runtime", "3s" if done else "1s"]
    seconds_a_batch = 0.1 if done else 0.4
    process = start_slowly(*words, seconds_a_shard=0.1, seconds_a_batch=seconds_a_batch, start=start_program)
    wait_for(lambda: shards(out), process)
    stop_for(process, seconds)
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    summary = json.loads(printed)
    assert (summary["stopped"], summary["encoded"] == 8) == (("", True) if done else ("max-runtime", False))


# ---------------------------------------------------------------------------------------------------- kills, locks


def test_a_killed_run_loses_at_most_the_shard_in_hand(extract, tmp_path, out):
    folder = many(tmp_path / "photos", IMAGES)
    words = ["extract", folder, "--out", out, "--model", "fake", "--patch-budget", 1]
    process = start_slowly(*words, seconds_a_shard=0.3, start=start_program)
    wait_for(lambda: len(shards(out)) >= 2 and staged(out), process)
    process.kill()
    process.communicate(timeout=60)
    survived = len(open_store(out))
    assert survived > 0
    assert extract(folder, patch_budget=1).encoded == IMAGES - survived
    assert not staged(out)
    extract(folder, out=tmp_path / "uninterrupted", patch_budget=1)
    assert contents(out) == contents(tmp_path / "uninterrupted")


HOLD = """
import sys, time
from pathlib import Path
from qvsplit.store.storage import LocalStorage
with LocalStorage(Path({out!r})).lock() as lock:
    lock.announce()
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_told_who_holds_the_store_and_readers_do_not_wait(extract, some_photos, out):
    extract(some_photos, limit=1)
    process = start_python(HOLD.format(out=str(out)))
    assert process.stdout.readline() == "locked\n"
    try:
        for _ in range(2):
            with pytest.raises(StoreInUse, match=f"process {process.pid} on .* since .*`wait=True`"):
                extract(some_photos)
        assert len(open_store(out)) == 1
        assert extract(some_photos, dry_run=True, model=None).to_read == 3
    finally:
        process.kill()
        process.communicate(timeout=60)
    assert extract(some_photos).encoded == 3  # the kernel freed the lock


def test_a_second_run_waits_if_asked_to(extract, some_photos, out):
    extract(some_photos, limit=1)
    ended, rans = threading.Event(), []
    with LocalStorage(out).lock() as held:
        held.announce()
        with pytest.raises(StoreInUse, match=rf"process {os.getpid()} on .* since .*`wait=True`"):
            extract(some_photos)

        def waiting() -> None:
            rans.append(extract(some_photos, wait=True))
            ended.set()

        thread = threading.Thread(target=waiting)
        thread.start()
        time.sleep(0.7)
        assert not ended.is_set()
    thread.join(60)
    assert ended.is_set()
    assert rans[0].notes[0].startswith(f"waiting for process {os.getpid()}")
    assert rans[0].new == 3


def test_a_run_with_nothing_to_do_is_told_too_that_the_store_is_in_use(extract, some_photos, out):
    extract(some_photos)
    with LocalStorage(out).lock(), pytest.raises(StoreInUse):
        extract(some_photos)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_refused(extract, some_photos, out, monkeypatch, code):
    def flock(descriptor, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("qvsplit.store.lock.fcntl.flock", flock)
    with pytest.raises(DiskError, match="without locks, where two runs could spoil") as refused:
        extract(some_photos)
    assert refused.value.exit_code == 7
    assert not shards(out)


# ------------------------------------------------------------------------------------- a model that is not loaded


@pytest.mark.parametrize("fault", ["no such folder", "no model", "damaged weights"])
def test_a_model_that_cannot_be_loaded_leaves_no_store_behind(some_photos, checkpoint, tmp_path, fault):
    model = tmp_path / "model"
    if fault != "no such folder":
        shutil.copytree(checkpoint, model)
        for file in model.glob("*.safetensors" if fault == "damaged weights" else "config.json"):
            file.write_bytes(file.read_bytes()[:100])
    done = run_program("extract", some_photos, "--out", tmp_path / "a" / "b" / "store", "--model", model)
    assert done.returncode == 3, done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2  # and what is left to do
    assert not (tmp_path / "a").exists()


def test_a_store_that_exists_stays_as_it_is_where_another_model_cannot_be_loaded(extract, some_photos, tmp_path, out):
    extract(some_photos)
    before = contents(out)
    with pytest.raises(ModelError):
        extract(some_photos, model=str(tmp_path / "none"))
    assert contents(out) == before


# ------------------------------------------------------------------------------------------------- disks, failures


def test_a_store_on_another_file_system_than_images_and_temporary_files(extract, some_photos, monkeypatch):
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == some_photos.stat().st_dev:
        pytest.skip("no second file system here")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        out = Path(folder) / "store"
        assert extract(some_photos, out=out).encoded == 4
        add(some_photos, "new.png")
        assert extract(some_photos, out=out, rebuild=True).encoded == 5
        with compact.opened_for_writing(out) as (storage, lock):
            compact.compact(storage, lock)
        assert len(open_store(out)) == 5
        assert extract(some_photos, out=out).to_read == 0


def test_a_store_without_hard_links(extract, some_photos, out, monkeypatch):
    def link(*names):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    assert extract(some_photos).encoded == 4
    add(some_photos, "new.png")
    assert extract(some_photos).encoded == 1
    assert [row.generation for row in open_store(out).rows if row.path in {"coins.png", "new.png"}] == [1, 2]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("there", [False, True], ids=["a new store", "a store"])
def test_a_store_that_cannot_be_written_is_said_in_one_line(extract, some_photos, tmp_path, there):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        if there:
            extract(some_photos, out=disk / "store")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        done = run_process("extract", some_photos, "--out", disk / "store", "--model", "demo")
        assert (done.returncode, done.stdout) == (7, "")
        (line,) = done.stderr.splitlines()
        assert str(disk / "store") in line and "Read-only file system" in line
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_keeps_finished_shards_and_exits_7(extract, run_cli, tmp_path, monkeypatch):
    folder = many(tmp_path / "photos", IMAGES)
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        out = disk / "embeds"
        with monkeypatch.context() as small:
            small.setattr("qvsplit.store.store_writer.SHARD_ROWS", 1)
            code, _, said = run_cli("extract", folder, "--out", out, "--model", "fake", "--patch-budget", 1)
        assert code == 7, said
        assert "the disk is full" in said
        assert len(said.strip().splitlines()) == 1
        held = len(open_store(out))
        assert 0 < held < IMAGES
        assert not staged(out)
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        assert extract(folder, out=out, model=None).encoded == IMAGES - held
    finally:
        subprocess.run(["umount", disk], check=True)


def test_rows_that_met_a_full_disk_are_not_half_kept(extract, some_photos, out, monkeypatch):
    """A write that failed may have left anything in the file: that shard never appears."""
    monkeypatch.setattr("qvsplit.store.shard_writer.ROW_GROUP_ROWS", 1)
    real, calls = pq.ParquetWriter.write_table, []

    def write_table(self, *args, **kwargs):
        calls.append(1)
        return _full() if len(calls) == 2 else real(self, *args, **kwargs)

    with monkeypatch.context() as broken:
        broken.setattr(pq.ParquetWriter, "write_table", write_table)
        with pytest.raises(DiskError, match="the disk is full"):
            extract(some_photos, patch_budget=1)
    assert extract.ended[-1].shards == 0
    assert shards(out) == staged(out) == []
    assert extract(some_photos).encoded == 4


def _full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_up_later_keeps_the_shards_before(extract, some_photos, out, monkeypatch):
    monkeypatch.setattr("qvsplit.store.store_writer.SHARD_ROWS", 1)
    real, calls = pq.ParquetWriter.write_table, []

    def write_table(self, *args, **kwargs):
        calls.append(1)
        return _full() if len(calls) == 3 else real(self, *args, **kwargs)

    with monkeypatch.context() as broken:
        broken.setattr(pq.ParquetWriter, "write_table", write_table)
        with pytest.raises(DiskError, match="the disk is full"):
            extract(some_photos, patch_budget=1)
    assert len(open_store(out)) == len(shards(out)) == 2
    assert extract(some_photos).encoded == 2


@contextmanager
def files_up_to(size: int):
    """Let no file become larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def add_video(folder: Path, name: str, n_frames: int = 60, **more) -> None:
    """Write a fake video of 30 parts of one second, 15 kB each."""
    (folder / name).write_bytes(fake_video(n_frames, 2.0, 800, 600, **more))
    os.utime(folder / name, OLD)


def test_a_scratch_file_that_cannot_be_written_costs_no_row_that_is_finished(
    extract, run_cli, some_photos, tmp_path, out, monkeypatch
):
    """Features of a video's parts, until the last is there, wait on the same disk: what they took is room then."""
    monkeypatch.setattr("qvsplit.pipeline.parts.IN_MEMORY_BYTES", 0)
    add_video(some_photos, "a.mp4", 4)
    add_video(some_photos, "z.mp4")
    with files_up_to(150_000):
        code, _, said = run_cli(
            "extract", some_photos, "--out", out, "--model", "fake", "--patch-budget", 1, "--clip-seconds", 1
        )
    assert code == 7, said
    (line,) = said.splitlines()
    assert f"{out / layout.STAGING}: cannot be written (File too large)" in line
    photos = {"chelsea.png", "coffee.png", "coins.png", "rocket.jpg"}
    assert {row.path for row in open_store(out)} == photos | {"a.mp4"}
    assert not staged(out)
    assert extract(some_photos).clips == 30
    extract(some_photos, out=tmp_path / "undisturbed", clip_seconds=1.0)
    assert parts(out) == parts(tmp_path / "undisturbed")


@pytest.mark.parametrize("number", [1, 2, 15, 30])
def test_a_full_disk_in_the_middle_of_a_videos_parts_keeps_none_of_them(
    extract, some_photos, tmp_path, out, monkeypatch, number
):
    monkeypatch.setattr("qvsplit.store.store_writer.ITEM_BYTES", 20_000)
    monkeypatch.setattr("qvsplit.store.shard_writer.ROW_GROUP_ROWS", 1)
    add_video(some_photos, "m.mp4")
    real, calls = pq.ParquetWriter.write_table, []

    def write_table(self, table, *args, **kwargs):
        calls.append(table["path"][0].as_py())
        return _full() if calls.count("m.mp4") == number else real(self, table, *args, **kwargs)

    with monkeypatch.context() as broken:
        broken.setattr(pq.ParquetWriter, "write_table", write_table)
        with pytest.raises(DiskError, match="the disk is full"):
            extract(some_photos, patch_budget=1, clip_seconds=1.0)
    assert {row.path for row in open_store(out)} == {"chelsea.png", "coffee.png", "coins.png"}
    assert not staged(out)
    assert extract(some_photos, clip_seconds=1.0).clips == 30
    extract(some_photos, out=tmp_path / "undisturbed", clip_seconds=1.0)
    assert parts(out) == parts(tmp_path / "undisturbed")


def parts(folder: Path) -> dict[tuple[str, int], bytes]:
    """The features of every current row, by path and part."""
    store = open_store(folder)
    return {(row.path, row.part): store.features(row).tensors["pooler_output"].raw.tobytes() for row in store}


def test_what_fails_in_a_device_worker_stops_the_run_and_keeps_what_was_written(extract, fake_model, some_photos, out):
    def on_encode(batch):
        if len(fake_model.batches) == 3:
            raise ModelError("the encoder is broken")

    fake_model.on_encode = on_encode
    with pytest.raises(ModelError, match="broken"):
        extract(some_photos, patch_budget=1)
    assert len(open_store(out)) == extract.ended[-1].encoded == 2
    last = json.loads((out / layout.HISTORY).read_text().splitlines()[-1])
    assert (last["error"], last["encoded"], last["remaining"]) == ("ModelError", 2, 2)
    fake_model.on_encode = lambda batch: None
    assert extract(some_photos).encoded == 2


def test_a_bug_too_keeps_what_was_written(extract, fake_model, some_photos, out):
    def on_encode(batch):
        if len(fake_model.batches) == 2:
            raise ZeroDivisionError

    fake_model.on_encode = on_encode
    with pytest.raises(ZeroDivisionError):
        extract(some_photos, patch_budget=1)
    assert len(open_store(out)) == 1


def test_rows_are_written_while_the_encoder_computes(extract, fake_model, some_photos, monkeypatch):
    """The first batch's rows are stored before the third leaves the encoder."""
    from qvsplit.store.shard_writer import ShardWriter

    written, real = threading.Event(), ShardWriter.add_encoded

    def on_encode(batch):
        if len(fake_model.batches) == 3:
            assert written.wait(30)

    def add(self, row):
        real(self, row)
        written.set()

    fake_model.on_encode = on_encode
    monkeypatch.setattr(ShardWriter, "add_encoded", add)
    assert extract(some_photos, patch_budget=1).encoded == 4
