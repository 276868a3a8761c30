"""Staged shards: each is there whole or not at all, whoever dies, and is one of the store's once it was committed."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from qvsplit.errors import DiskError, ShardDamaged
from qvsplit.runtime.atomic_files import remove_folder
from qvsplit.store import layout
from qvsplit.store.opening import read_store
from qvsplit.store.shard_reader import Shard, sound_checksum
from qvsplit.store.shard_writer import ShardWriter
from qvsplit.store.shards import ShardNumbers, shards_in
from qvsplit.store.staging import Staging
from qvsplit.store.storage import LocalStorage
from qvsplit.store.store_writer import StoreWriter
from tests.support import rows


@pytest.fixture
def storage(tmp_path) -> LocalStorage:
    return LocalStorage(tmp_path / "store")


@pytest.fixture
def staging(storage) -> Staging:
    made = Staging(storage.folder, "run-7")
    made.create()
    return made


def staged(staging: Staging, *names: str) -> str:
    """Stage a shard of these items; gives its name."""
    name = staging.new_name()
    writer = ShardWriter(staging, name, rows.schema())
    for one in names:
        writer.add(*rows.item(one))
    writer.finish()
    return name


def names_in(staging: Staging) -> list[str]:
    return sorted(path.name for path in staging.folder.iterdir())


# ------------------------------------------------------------------------------------------------ whole or not at all


def test_what_is_staged_is_there_at_the_end_of_the_block_and_no_shard_of_the_store(storage, staging):
    with staging.put_whole("a.parquet") as stream:
        stream.write(b"0123")
        stream.seek(1)
        assert stream.read(2) == b"12"  # a shard's checksum is inserted into what was written
    assert (staging.folder / "a.parquet").read_bytes() == b"0123"
    assert shards_in(storage) == []


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, DiskError])
def test_an_error_in_the_block_leaves_nothing(staging, error):
    with pytest.raises(error), staging.put_whole("a.parquet") as stream:
        raise error(str(stream.write(b"half")))
    assert names_in(staging) == []


def test_what_is_there_stays(staging):
    with staging.put_whole("a.parquet") as stream:
        stream.write(b"whole")
    with pytest.raises(DiskError), staging.put_whole("a.parquet"):
        pass
    assert (staging.folder / "a.parquet").read_bytes() == b"whole"


def test_a_shard_that_is_given_up_leaves_nothing(staging):
    writer = ShardWriter(staging, staging.new_name(), rows.schema())
    writer.add(*rows.item("a.png"))
    assert len(names_in(staging)) == 1
    writer.abandon()
    assert names_in(staging) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_leaves_nothing_and_is_named(staging, monkeypatch, code):
    writer = ShardWriter(staging, staging.new_name(), rows.schema())
    writer.add(*rows.item("a.png"))

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskError, match="is full" if code == errno.ENOSPC else "cannot be written") as caught:
        writer.finish()
    assert str(staging.store) in str(caught.value) and caught.value.exit_code == 7
    assert names_in(staging) == []


def test_what_is_durable_is_synced_with_its_entry(staging, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    with staging.put_whole("a.parquet"):
        pass
    assert synced == [str(staging.folder / "a.parquet"), str(staging.folder)]
    with staging.put_whole("b.parquet", durable=False):
        pass
    assert len(synced) == 2


def test_no_two_attempts_have_the_same_name():
    names = {Staging.new_name() for _ in range(1000)}
    assert len(names) == 1000
    assert all(layout.shard_number(name) is None for name in names)


def test_a_killed_writer_leaves_no_shard_and_the_next_writer_of_the_store_clears_up(storage, staging):
    whole = staged(staging, "a.png")
    code = f"""
import os, signal
from pathlib import Path
from qvsplit.store.shard_writer import ShardWriter
from qvsplit.store.staging import Staging
from tests.support import rows
writer = ShardWriter(Staging(Path({str(storage.folder)!r}), "run-7"), "killed.parquet", rows.schema())
writer.add(*rows.item("b.png"))
writer._flush()
writer._stream.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert names_in(staging) == sorted([whole, "killed.parquet"])
    assert (staging.folder / "killed.parquet").stat().st_size > 0
    assert shards_in(storage) == []
    with storage.lock():
        assert list((storage.folder / layout.STAGING).iterdir()) == []
        other = Staging(storage.folder, "run-8")
        other.create()
        other.commit(storage, staged(other, "c.png"), 1)
    assert [row.path for row in read_store(storage).rows] == ["c.png"]


def test_the_lock_clears_folders_within_folders_and_files(storage, staging):
    staged(staging, "a.png")
    (staging.folder / "deeper").mkdir()
    (staging.folder / "deeper" / "x").write_bytes(b"x")
    (storage.folder / layout.STAGING / ".shard-000001.parquet.1.tmp").write_bytes(b"x")
    (storage.folder / "shard-000003.parquet").write_bytes(b"mine")
    with storage.lock():
        assert list((storage.folder / layout.STAGING).iterdir()) == []
    assert shards_in(storage) == ["shard-000003.parquet"]


# ----------------------------------------------------------------------------------------------------------- commits


def test_a_staged_shard_that_is_committed_is_one_of_the_store(storage, staging):
    name = staged(staging, "a.png", "b.png")
    size = (staging.folder / name).stat().st_size
    staging.commit(storage, name, 12)
    assert names_in(staging) == []
    assert [(file.name, file.size) for file in storage.list()] == [("shard-000012.parquet", size)]
    shard = Shard(storage, "shard-000012.parquet")
    assert sound_checksum(storage, shard.name) == shard.checksum is not None
    expected = [rows.item("a.png"), rows.item("b.png")]
    assert [(row, rows.raws(features)) for _, row, features in shard] == [
        (row, rows.raws(features)) for row, features in expected
    ]


def test_the_size_of_a_staged_shard(staging):
    name = staged(staging, "a.png")
    assert staging.size(name) == (staging.folder / name).stat().st_size > 0
    with pytest.raises(DiskError, match=str(staging.store)):
        staging.size("gone.parquet")


def test_a_commit_survives_a_power_loss(storage, staging, monkeypatch):
    name, steps = staged(staging, "a.png"), []
    real, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    monkeypatch.setattr(os, "rename", lambda *names: (steps.append("rename"), rename(*names)))
    staging.commit(storage, name, 1)
    assert steps[0] == "rename"
    assert set(steps[1:]) == {str(storage.folder), str(staging.folder)}


def test_what_was_cut_short_is_no_shard(storage, staging):
    """As after a power loss on a disk that lies: the checksum stands at the end."""
    name = staged(staging, "a.png")
    content = (staging.folder / name).read_bytes()
    (staging.folder / name).write_bytes(content[:-20])
    staging.commit(storage, name, 1)
    assert sound_checksum(storage, "shard-000001.parquet") is None
    with pytest.raises(ShardDamaged):
        Shard(storage, "shard-000001.parquet")


def test_a_commit_of_what_is_not_there_is_an_error_of_the_disk(storage, staging):
    with pytest.raises(DiskError, match=str(storage.folder)):
        staging.commit(storage, "gone.parquet", 1)
    assert shards_in(storage) == []


def test_it_is_the_same_in_another_process(storage, staging):
    again = pickle.loads(pickle.dumps(staging))
    assert again == staging
    staging.commit(storage, staged(again, "a.png"), 1)
    assert again.location == str(storage.folder)
    assert shards_in(storage) == ["shard-000001.parquet"]


# -------------------------------------------------------------------------------------- writers that outlive their run


def test_where_the_folder_of_the_run_is_not_nothing_is_written(storage, staging):
    staging.remove()
    for refused in (
        staging.check, lambda: staged(staging, "a.png"), lambda: staging.put_whole("a.parquet").__enter__(),
    ):  # fmt: skip
        with pytest.raises(DiskError, match=f"^{staging.folder} is not there on .*same paths") as caught:
            refused()
        assert caught.value.exit_code == 7
    assert not staging.folder.exists()  # nor made again


@pytest.mark.parametrize("store_too", [False, True])
def test_a_writer_whose_run_ends_meanwhile_fails_and_leaves_nothing(storage, staging, store_too):
    writer = ShardWriter(staging, staging.new_name(), rows.schema())
    writer.add(*rows.item("a.png"))
    if store_too:
        shutil.rmtree(storage.folder)
    else:
        staging.remove()
    with pytest.raises(DiskError) as caught:
        writer.finish()
    assert caught.value.exit_code == 7
    assert not staging.folder.exists()
    assert storage.folder.exists() != store_too
    assert shards_in(storage) == []


def test_another_run_does_not_take_a_folder_that_is_there(staging):
    with pytest.raises(DiskError):
        staging.create()


def test_the_folder_of_another_run_stays(storage, staging):
    other = Staging(storage.folder, "run-8")
    other.create()
    name = staged(staging, "a.png")
    other.remove()
    assert names_in(staging) == [name]


def test_what_is_gone_already_is_no_error(staging):
    staging.remove()
    staging.remove()
    assert not staging.folder.exists()


def test_it_is_removed_beside_a_writer_that_goes_on(staging):
    """On another machine, say: it finds the folder gone, and stops there."""
    begun, ended = threading.Event(), []

    def write() -> None:
        try:
            for number in range(100_000):
                with staging.put_whole(f"{number}.parquet") as stream:
                    stream.write(b"x")
                begun.set()
        except DiskError as error:
            ended.append(error)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    assert begun.wait(20)
    staging.remove()
    for writer in writers:
        writer.join(20)
    assert len(ended) == 2
    assert not staging.folder.exists()


def test_nothing_can_come_while_it_is_removed(staging, monkeypatch):
    real, refused = os.rmdir, []

    def rmdir(path: object, **options: object) -> None:
        with pytest.raises(FileNotFoundError):
            (staging.folder / "late.parquet").write_bytes(b"x")
        refused.append(path)
        real(path, **options)

    monkeypatch.setattr(os, "rmdir", rmdir)
    remove_folder(staging.folder)
    assert refused
    assert list(staging.folder.parent.iterdir()) == []


def test_what_goes_while_it_is_removed_is_no_error(staging, monkeypatch):
    gone = [staging.folder / staged(staging, "a.png") for _ in range(2)]
    real = os.unlink

    def unlink(path: object, **options: object) -> None:
        for one in gone:
            if one.exists():
                real(one)
        real(path, **options)

    monkeypatch.setattr(os, "unlink", unlink)
    staging.remove()
    assert not staging.folder.exists()


def test_what_cannot_be_removed_is_an_error_of_the_disk(staging, monkeypatch):
    staged(staging, "a.png")

    def fail(*names: object, **options: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "unlink", fail)
    with pytest.raises(DiskError, match="cannot be written"):
        staging.remove()


# ----------------------------------------------------------------------------------------------- the numbers of shards


class Listed(LocalStorage):
    """Counts how often the store is listed."""

    times = 0

    def list(self, folder: str = ""):
        self.times += 1
        return super().list(folder)


def test_numbers_are_above_all_that_are_there_and_each_is_given_once(tmp_path):
    storage = Listed(tmp_path)
    for name in ("shard-000002.parquet", "shard-000041.parquet", "shard-99.parquet", "other.parquet"):
        (tmp_path / name).write_bytes(b"")
    numbers = ShardNumbers(storage)
    assert storage.times == 0  # not before the first shard
    taken = []
    for _ in range(20):
        taken.append(numbers.take())
        (tmp_path / layout.shard_name(taken[-1])).write_bytes(b"")
    assert taken == list(range(42, 62))
    assert storage.times == 1
    (tmp_path / layout.shard_name(61)).unlink()  # a number that was given is not given again
    assert numbers.take() == 62


@pytest.mark.parametrize(
    ("present", "first", "expected"), [(0, 1, 1), (0, 30, 30), (7, 30, 30), (30, 7, 31), (29, 30, 30)]
)
def test_numbers_begin_where_they_are_told_to(tmp_path, present, first, expected):
    if present:
        (tmp_path / layout.shard_name(present)).write_bytes(b"")
    numbers = ShardNumbers(LocalStorage(tmp_path), first)
    assert [numbers.take(), numbers.take()] == [expected, expected + 1]


def test_a_writer_and_commits_never_take_each_others_number(storage, staging):
    """The writer's shard is begun, others are committed, then it is finished: all are there."""
    numbers = ShardNumbers(storage)
    writer = StoreWriter(storage, rows.schema(), numbers=numbers)
    staging.commit(storage, staged(staging, "a.png"), numbers.take())
    writer.append(*rows.item("b.png"))
    staging.commit(storage, staged(staging, "c.png"), numbers.take())
    staging.commit(storage, staged(staging, "d.png"), numbers.take())
    writer.end_shard()
    writer.append(*rows.item("e.png"))
    writer.end_shard()
    found = {shard.name: [row.path for row in shard.rows] for shard in read_store(storage).shards}
    assert found == {layout.shard_name(number): [f"{name}.png"] for number, name in enumerate("abcde", 1)}


def test_the_number_of_a_shard_that_was_given_up_is_not_given_again(storage, staging):
    numbers = ShardNumbers(storage)
    writer = StoreWriter(storage, rows.schema(), numbers=numbers)
    writer.append(*rows.item("a.png"))
    staging.commit(storage, staged(staging, "b.png"), numbers.take())
    writer.abandon()
    writer.append(*rows.item("c.png"))
    writer.end_shard()
    assert shards_in(storage) == ["shard-000002.parquet", "shard-000003.parquet"]
    assert [row.path for row in read_store(storage).rows] == ["b.png", "c.png"]
