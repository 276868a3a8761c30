"""Reading a file: its hash and stat, when the stat is trusted, and every way it can fail."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from pathlib import Path

import pytest

from qvsplit.errors import ItemError, ItemNotFound
from qvsplit.sources import files
from qvsplit.sources.files import FileInfo, open_long_path, read, read_either
from qvsplit.sources.source import Entry

OLD = 1_600_000_000


def entry(folder: Path, name: str, size: int = 0) -> Entry:
    return Entry(str(folder), name, size, None, None)


@pytest.fixture
def old(tmp_path) -> Path:
    """A file that was not touched just now."""
    file = tmp_path / "a.png"
    file.write_bytes(b"some bytes")
    os.utime(file, (OLD, OLD))
    return file


def test_bytes_hash_size_time_and_version(old):
    file = read(entry(old.parent, "a.png"))
    digest = hashlib.sha256(b"some bytes").hexdigest()
    assert (file.data, file.info) == (b"some bytes", FileInfo(digest, 10, OLD * 10**9, str(OLD * 10**9)))


def test_an_empty_file_is_read(tmp_path):
    (tmp_path / "empty.png").touch()
    assert read(entry(tmp_path, "empty.png")).sha256 == hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize(
    ("seconds", "trusted"), [(-3600, True), (-3, True), (-1, False), (0.5, False), (3600, False), (25 * 3600, True)]
)
def test_a_fresh_files_stat_is_not_trusted(tmp_path, seconds, trusted):
    """Nor one that is a little ahead of our clock; its time is told all the same."""
    (tmp_path / "a.png").write_bytes(b"x")
    mtime_ns = time.time_ns() + int(seconds * 10**9)
    os.utime(tmp_path / "a.png", ns=(mtime_ns, mtime_ns))
    file = read(entry(tmp_path, "a.png"))
    assert file.mtime_ns == os.stat(tmp_path / "a.png").st_mtime_ns
    assert file.version == (str(file.mtime_ns) if trusted else None)


def test_a_file_that_changes_while_it_is_read_is_not_trusted(old, monkeypatch):
    plain = files._read_whole

    def growing(stream, size):
        with old.open("ab") as appended:
            appended.write(b"more")
        return plain(stream, size)

    monkeypatch.setattr(files, "_read_whole", growing)
    file = read(entry(old.parent, "a.png"))
    assert file.version is None  # read again by the next run
    assert file.mtime_ns == OLD * 10**9
    assert file.size == len(file.data) == len(b"some bytesmore")


@pytest.mark.parametrize(
    ("name", "size", "reason", "kind", "error"),
    [
        ("pipe.png", 0, "not a regular file", "content", ItemError),
        ("folder.png", 0, "not a regular file", "content", ItemError),
        ("device.png", 0, "not a regular file", "content", ItemError),
        ("deleted.png", 5, "no longer there", "content", ItemNotFound),
        ("large.png/below.png", 5, "no longer there", "content", ItemNotFound),  # a file is where its folder was
        ("dangling.png", -1, "cannot be opened: No such file", "permission", ItemError),
        ("loop.png", -1, "cannot be opened: Too many levels", "permission", ItemError),
        ("large.png", 0, "is larger than 1024 MiB", "content", ItemError),
    ],
)
def test_what_cannot_be_read_neither_hangs_nor_crashes(tmp_path, name, size, reason, kind, error):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "dangling.png").symlink_to("nothing.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    with (tmp_path / "large.png").open("wb") as stream:
        stream.truncate((1 << 30) + 1)
    with pytest.raises(ItemError, match=reason) as caught:
        read(entry(tmp_path, name, size))
    assert (caught.value.kind, type(caught.value)) == (kind, error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(old):
    old.chmod(0)
    with pytest.raises(ItemError, match="Permission denied") as caught:
        read(entry(old.parent, "a.png"))
    assert caught.value.kind == "permission"


@pytest.mark.parametrize(
    ("step", "raised", "reason", "kind"),
    [
        ("open_long_path", PermissionError(errno.EACCES, "Permission denied"), "cannot be opened: Perm", "permission"),
        ("open_long_path", OSError(errno.EIO, "Input/output error"), "cannot be opened: Input", "permission"),
        ("_read_whole", OSError(errno.EIO, "Input/output error"), "cannot be read: Input", "permission"),
        ("_read_whole", MemoryError(), "does not fit into memory", "memory"),
    ],
)
def test_what_the_system_refuses_has_its_kind(old, monkeypatch, step, raised, reason, kind):
    def refuse(*args):
        raise raised

    monkeypatch.setattr(files, step, refuse)
    with pytest.raises(ItemError, match=reason) as caught:
        read(entry(old.parent, "a.png"))
    assert caught.value.kind == kind


def test_a_file_that_grows_beyond_what_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 1000)
    (tmp_path / "a.png").write_bytes(b"x" * 1001)
    with pytest.raises(ItemError, match="is larger than"):
        read(entry(tmp_path, "a.png"))
    (tmp_path / "a.png").write_bytes(b"x" * 1000)
    assert read(entry(tmp_path, "a.png")).size == 1000


def test_a_path_longer_than_the_system_takes_at_once(tmp_path):
    here = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(20):
            os.mkdir("d" * 250, dir_fd=here)
            inner = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = inner
        os.close(os.open("deep.png", os.O_WRONLY | os.O_CREAT, dir_fd=here))
    finally:
        os.close(here)
    long = os.path.join(str(tmp_path), *["d" * 250] * 20)
    os.close(open_long_path(os.path.join(long, "deep.png"), os.O_RDONLY))
    with pytest.raises(FileNotFoundError):
        open_long_path(os.path.join(long, "other.png"), os.O_RDONLY)
    with pytest.raises(OSError, match="too long"):
        open_long_path(str(tmp_path / ("x" * 300)), os.O_RDONLY)
    assert read(entry(Path(long), "deep.png")).size == 0


# --------------------------------------------------------------------------------------------------------------- videos


def as_video(at: Path, **more):
    return read_either(
        entry(at.parent, at.name), head_bytes=4, kind_of=lambda head: "video" if head == b"some" else "image", **more
    )


def test_a_video_is_hashed_in_blocks_and_stays_open(old, monkeypatch):
    """It may be larger than an image; its bytes are not in memory."""
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 5)
    monkeypatch.setattr(files, "_HASHED_BYTES", 4)
    blocks = []
    file, video = as_video(old, on_progress=lambda: blocks.append(1))
    digest = hashlib.sha256(b"some bytes").hexdigest()
    assert (file.data, file.info) == (b"", FileInfo(digest, 10, OLD * 10**9, str(OLD * 10**9), "video"))
    assert len(blocks) == 3
    old.unlink()
    assert os.pread(video.stream.fileno(), 4, 0) == b"some"
    video.check_unchanged()
    video.stream.close()


def test_an_image_among_videos_is_read_whole(old):
    old.write_bytes(b"else")
    file, video = as_video(old)
    assert (file.data, file.info.kind, video) == (b"else", "image", None)


@pytest.mark.parametrize("change", ["longer", "shorter", "as long"])
def test_a_video_that_changes_after_it_was_hashed(old, change):
    _, video = as_video(old)
    with old.open("r+b") as stream:
        stream.truncate(5) if change == "shorter" else stream.write(b"x" * (11 if change == "longer" else 10))
    with pytest.raises(ItemError, match="was changed while it was being read"):
        video.check_unchanged()
    video.stream.close()


@pytest.mark.parametrize("size", [5, 10_000])
def test_a_video_that_changes_while_it_is_hashed(old, monkeypatch, size):
    """Also one that grows as fast as it is read comes to an end."""
    monkeypatch.setattr(files, "_HASHED_BYTES", 4)
    blocks = []

    def change() -> None:
        blocks.append(1)
        os.truncate(old, size)

    with pytest.raises(ItemError, match="was changed while it was being read"):
        as_video(old, on_progress=change)
    assert len(blocks) < 5
