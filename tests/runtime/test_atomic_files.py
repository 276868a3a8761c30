"""Files appear whole or not at all, and errors of the disk say what to do."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from qvsplit.errors import DiskError
from qvsplit.runtime.atomic_files import disk_errors, sync_folder, written_whole


def put(file, data: bytes, **options) -> None:
    with written_whole(file, **options) as stream:
        stream.write(data)


def test_a_file_appears_at_the_end_of_the_block(tmp_path):
    file = tmp_path / "a"
    with written_whole(file) as stream:
        stream.write(b"x")
        stream.flush()
        assert not file.exists()
        assert all(name.startswith(".") for name in os.listdir(tmp_path))
    assert file.read_bytes() == b"x" and os.listdir(tmp_path) == ["a"]


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path):
    put(tmp_path / "a", b"old")
    with pytest.raises(KeyError), written_whole(tmp_path / "a") as stream:
        raise KeyError(stream.write(b"new"))
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_it_is_staged_elsewhere_if_asked(tmp_path):
    staging = tmp_path / "staging"
    staging.mkdir()
    with written_whole(tmp_path / "a", staging=staging) as stream:
        stream.write(b"x")
        assert len(os.listdir(staging)) == 1 and not (tmp_path / "a").exists()
    assert os.listdir(staging) == [] and (tmp_path / "a").read_bytes() == b"x"


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(tmp_path):
    (tmp_path / f".a.{os.getpid()}.tmp").write_bytes(b"half of something else, and longer")
    put(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x" and os.listdir(tmp_path) == ["a"]


def test_permissions_are_those_of_what_it_replaces(tmp_path):
    put(tmp_path / "a", b"")
    (tmp_path / "a").chmod(0o600)
    put(tmp_path / "a", b"x")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("durable", "expected"), [(True, ["fsync", "replace", "fsync"]), (False, ["replace"])])
def test_what_is_durable_is_synced_before_and_after_the_rename(tmp_path, monkeypatch, durable, expected):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    put(tmp_path / "a", b"x", durable=durable)
    assert calls == expected


def test_syncing_a_file_as_a_folder_is_an_error(tmp_path):
    put(tmp_path / "a", b"")
    sync_folder(tmp_path)
    with pytest.raises(NotADirectoryError):
        sync_folder(tmp_path / "a")


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        (errno.ENOSPC, ("/some/place", "the disk is full", "finished shards are kept", "make room and run again")),
        (errno.EDQUOT, ("the disk is full", "make room")),
        (errno.EACCES, ("cannot be written (Permission denied)", "finished shards are kept", "choose another folder")),
        (errno.EROFS, ("cannot be written (Read-only file system)", "change its permissions")),
    ],
)
def test_errors_of_the_disk_name_the_place_and_what_to_do(code, parts):
    with pytest.raises(DiskError) as caught, disk_errors("/some/place"):
        raise OSError(code, os.strerror(code))
    assert all(part in str(caught.value) for part in parts)
    assert caught.value.exit_code == 7


def test_what_is_kept_and_what_else_may_be_chosen_can_be_said():
    said = "/x: cannot be written .*; the table is kept; choose another file, or"
    words = {"kept": "the table is kept", "elsewhere": "choose another file"}
    with pytest.raises(DiskError, match=said), disk_errors("/x", **words):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    with (
        pytest.raises(DiskError, match="; make room and run again, or choose another file$"),
        disk_errors("/x", **words),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(DiskError, match=r"^/x: the disk is full; make room and run again$"), disk_errors("/x", kept=""):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_other_errors_pass():
    with pytest.raises(KeyError), disk_errors("/x"):
        raise KeyError


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_that_syncs_no_folders_is_written_to(tmp_path, monkeypatch, code):
    """And where permissions cannot be set, as on vfat, files have those that it gives."""
    plain = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        plain(descriptor)

    def fchmod(descriptor, mode):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "fchmod", fchmod)
    for data in (b"one", b"two"):
        put(tmp_path / "a", data)
        assert (tmp_path / "a").read_bytes() == data


def test_a_folder_whose_sync_fails_is_an_error(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)
