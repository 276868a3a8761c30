"""The Storage door: the same contract for every implementation, and what the local disk adds."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qvsplit.errors import DiskError, StoreInUse
from qvsplit.store import layout
from qvsplit.store.storage import LocalStorage, Storage
from tests.support.memory_storage import MemoryStorage


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path) -> Storage:
    return LocalStorage(tmp_path / "store") if request.param == "local" else MemoryStorage()


def put(storage: Storage, name: str, content: bytes) -> None:
    with storage.put_whole(name) as stream:
        stream.write(content)


def get(storage: Storage, name: str) -> bytes:
    with storage.open(name) as stream:
        return stream.read()


def listed(storage: Storage, folder: str = "") -> dict[str, int]:
    return {file.name: file.size for file in storage.list(folder)}


# ------------------------------------------------------------------------------------------------------ the contract


def test_nothing_is_there_before_anything_is_put(storage):
    assert storage.list() == storage.list("a/b") == []
    with pytest.raises(FileNotFoundError):
        storage.open("a")


def test_what_is_put_is_listed_and_opened(storage):
    put(storage, "b", b"two")
    put(storage, "a", b"")
    put(storage, ".qvsplit/x/c", b"three")
    assert listed(storage) == {"a": 0, "b": 3}
    assert list(listed(storage)) == ["a", "b"]  # sorted
    assert listed(storage, ".qvsplit/x") == {"c": 5}
    assert listed(storage, ".qvsplit") == {}  # not what lies below
    assert get(storage, ".qvsplit/x/c") == b"three"
    with storage.open("b") as stream:
        stream.seek(1)
        assert stream.read() == b"wo"


def test_a_place_is_named_for_people(storage):
    assert storage.location and storage.where("a/b").startswith(storage.location)
    assert storage.where("a/b").endswith("a/b")


def test_putting_replaces_and_changes_the_version(storage):
    put(storage, "a", b"one")
    before = storage.list()[0].version
    put(storage, "a", b"two")
    assert get(storage, "a") == b"two"
    assert storage.list()[0].version != before


def test_a_stream_may_be_read_and_sought_while_it_is_written(storage):
    with storage.put_whole("a") as stream:
        stream.write(b"0123456789")
        stream.seek(3)
        assert stream.read(2) == b"34"
        stream.seek(0, os.SEEK_END)
        stream.write(b"!")
        assert stream.tell() == 11 and stream.fileno() >= 0
    assert get(storage, "a") == b"0123456789!"


@pytest.mark.parametrize("durable", [True, False])
def test_what_is_put_appears_whole_at_the_end_of_the_block_and_not_before(storage, durable):
    with storage.put_whole("a", durable=durable) as stream:
        stream.write(b"half")
        stream.flush()
        assert storage.list() == []
    assert listed(storage) == {"a": 4}


def test_an_error_in_the_block_leaves_what_was_there(storage):
    put(storage, "a", b"old")
    for name in ("a", "b"):
        with pytest.raises(KeyError), storage.put_whole(name) as stream:
            raise KeyError(stream.write(b"new"))
    assert listed(storage) == {"a": 3} and get(storage, "a") == b"old"
    assert storage.list(layout.STAGING) == []


def test_putting_if_absent_happens_once(storage):
    assert storage.put_if_absent("x/a", b"first")
    assert not storage.put_if_absent("x/a", b"second")
    assert get(storage, "x/a") == b"first"
    assert storage.list(layout.STAGING) == []


def test_moving_replaces(storage):
    put(storage, "a", b"one")
    put(storage, "x/b", b"two")
    storage.move("a", "x/b")
    storage.move("x/b", "y/z/c")
    assert storage.list() == storage.list("x") == []
    assert get(storage, "y/z/c") == b"one"


def test_deleting_what_does_not_exist_is_no_error(storage):
    put(storage, "a", b"")
    put(storage, "x/b", b"")
    storage.delete("a", "x/b", "c", "nowhere/d")
    storage.delete()
    assert storage.list() == storage.list("x") == []


def test_there_is_one_writer(storage):
    with storage.lock() as lock:
        lock.announce()
        with pytest.raises(StoreInUse, match="is being written"), storage.lock():
            pass
    with storage.lock(), pytest.raises(StoreInUse), storage.lock():
        pass


def test_the_lock_ends_with_an_error(storage):
    with pytest.raises(KeyError), storage.lock():
        raise KeyError
    with storage.lock():
        pass


def test_the_next_writer_deletes_what_was_half_written(storage):
    put(storage, f"{layout.STAGING}/.shard-000001.parquet.123.tmp", b"half")
    put(storage, "shard-000001.parquet", b"whole")
    with storage.lock():
        assert storage.list(layout.STAGING) == []
        assert listed(storage) == {"shard-000001.parquet": 5}


# ---------------------------------------------------------------------------------------------------- the local disk


@pytest.fixture
def local(tmp_path) -> LocalStorage:
    return LocalStorage(tmp_path / "store")


def test_reading_creates_nothing(local):
    assert local.list() == []
    assert not local.folder.exists()


def test_many_who_put_the_same_name_at_once_are_told_apart(local):
    """Also within one process, whose threads share its number."""
    for round_ in range(20):
        won, errors, start = [], [], threading.Barrier(6)

        def claim(number, name=f"g/{round_}", won=won, errors=errors, start=start):
            start.wait()
            try:
                if local.put_if_absent(name, b"%d" % number):
                    won.append(number)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=claim, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert [b"%d" % number for number in won] == [get(local, f"g/{round_}")]


def test_a_file_that_vanishes_during_the_listing_hides_no_other(local, monkeypatch):
    for name in "abcdef":
        put(local, name, b"")
    real = os.scandir

    class Scan:
        def __init__(self, folder):
            self.entries = list(real(folder))

        def __enter__(self):
            (local.folder / self.entries[0].name).unlink()
            return iter(self.entries)

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(os, "scandir", Scan)
    assert len(local.list()) == 5


def test_killed_in_between_it_leaves_only_staging(local):
    put(local, "a", b"old")
    code = f"""
import os, signal
from pathlib import Path
from qvsplit.store.storage import LocalStorage
with LocalStorage(Path({str(local.folder)!r})).put_whole("a") as stream:
    stream.write(b"half")
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert get(local, "a") == b"old"
    assert [path.name for path in local.folder.iterdir() if path.name != "a"] == [layout.OWN_FOLDER]
    assert len(local.list(layout.STAGING)) == 1
    with local.lock():
        assert local.list(layout.STAGING) == []


def test_its_folders_are_made_and_their_entries_synced(local, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    put(local, "a", b"")
    assert str(local.folder.parent) in synced  # the store's own entry
    assert synced[-1] == str(local.folder)  # the rename
    synced.clear()
    local.delete("a")
    assert synced == [str(local.folder)]
    with local.put_whole("cache", durable=False) as stream:
        stream.write(b"x")
    assert str(local.folder) not in synced[1:]


def test_a_replaced_file_keeps_its_permissions(local):
    put(local, "a", b"")
    (local.folder / "a").chmod(0o640)
    put(local, "a", b"new")
    assert (local.folder / "a").stat().st_mode & 0o777 == 0o640


def test_what_is_no_regular_file_is_not_waited_for(local):
    local.folder.mkdir()
    os.mkfifo(local.folder / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        local.open("pipe")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_errors_of_the_disk_name_the_store(local, monkeypatch, code):
    put(local, "a", b"")

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    for name in ("fsync", "link", "rename", "replace"):
        monkeypatch.setattr(os, name, fail)
    monkeypatch.setattr(Path, "unlink", fail)
    for act in (
        lambda: put(local, "b", b""), lambda: local.put_if_absent("c", b""), lambda: local.move("a", "d"),
        lambda: local.delete("a"),
    ):  # fmt: skip
        with pytest.raises(
            DiskError, match="the disk is full" if code == errno.ENOSPC else "cannot be written"
        ) as caught:
            act()
        assert str(local.folder) in str(caught.value)


def test_a_folder_whose_name_is_not_utf_8(tmp_path):
    local = LocalStorage(Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xff")))
    put(local, "a", b"x")
    with local.lock():
        assert listed(local) == {"a": 1}


# ------------------------------------------------------------------------------------------- file systems that lack it


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_without_hard_links_putting_if_absent_still_happens_once(tmp_path, monkeypatch, code):
    def link(*names):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    storage = LocalStorage(tmp_path / "store")
    assert storage.put_if_absent("x/a", b"first")
    assert not storage.put_if_absent("x/a", b"second")
    assert get(storage, "x/a") == b"first"
    assert storage.list(layout.STAGING) == []


def test_a_link_that_fails_for_another_reason_is_an_error(tmp_path, monkeypatch):
    def link(*names):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(DiskError, match="Input/output error"):
        LocalStorage(tmp_path / "store").put_if_absent("x/a", b"first")
    assert not (tmp_path / "store" / "x" / "a").exists()


# -------------------------------------------------------------------------------------------- a store without a shard


def test_a_store_that_got_no_shard_is_removed_with_what_was_created_for_it(tmp_path):
    folder = tmp_path / "a" / "b" / "store"
    storage = LocalStorage(folder)
    with storage.lock() as lock:
        lock.announce()
        storage.put_if_absent(f"{layout.GENERATIONS}/000000000001", b"{}")
        put(storage, layout.HISTORY, b"{}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", ["shard", "foreign", "own folder"])
def test_what_was_there_before_or_holds_something_stays(tmp_path, kept):
    folder = tmp_path / "a" / "store"
    storage = LocalStorage(folder)
    if kept == "own folder":
        put(storage, f"{layout.QUARANTINE}/shard-000001.parquet", b"x")
    with storage.lock():
        if kept == "shard":
            put(storage, "shard-000001.parquet", b"x")
        elif kept == "foreign":
            (folder / "notes.txt").write_text("mine")
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    expected = {
        "shard": {"shard-000001.parquet", layout.LOCK},
        "foreign": {"notes.txt"},
        "own folder": {f"{layout.QUARANTINE}/shard-000001.parquet", layout.LOCK},
    }
    assert left == expected[kept]


def test_an_empty_folder_that_was_there_before_stays(tmp_path):
    with LocalStorage(tmp_path).lock():
        pass
    assert tmp_path.is_dir() and list(tmp_path.iterdir()) == []
