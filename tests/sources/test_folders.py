"""The walk over folders: what is listed, under which names, and what is left out."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from qvsplit.errors import UsageError
from qvsplit.runtime.names import name_on_disk, stored_name
from qvsplit.sources import images
from qvsplit.sources.files import read
from qvsplit.sources.folders import IMAGE_SUFFIXES, SUFFIXES, VIDEO_SUFFIXES, LocalFolders, root_of, starts_of
from qvsplit.sources.source import Entry
from tests.support.fake_source import FakeSource
from tests.support.nasty_images import encoded
from tests.support.photographs import same_rgb
from tests.support.processes import as_nobody


def walked(paths, **more) -> list[Entry]:
    return [one for listing in LocalFolders(paths, **more).list({}) for one in listing.entries()]


def test_the_walk_is_sorted_and_leaves_out_what_is_not_ours(tmp_path):
    for name in ("b.jpg", "a.JPEG", "c.txt", ".hidden.png", "deep/z.png", "deep/.thumbs/x.png", "store/shard-000001.parquet",
                 "store/stray.png", "deep/no_suffix"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [one.path for one in walked([tmp_path])] == ["a.JPEG", "b.jpg", "deep/z.png"]
    assert {one.root for one in walked([tmp_path])} == {str(tmp_path)}


def test_a_walk_takes_images_and_videos_or_one_of_the_two(tmp_path):
    for name in ("a.jpg", "b.MP4", "c.mkv", "d.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert [one.path for one in walked([tmp_path])] == ["a.jpg", "b.MP4", "c.mkv"]
    assert [one.path for one in walked([tmp_path], suffixes=IMAGE_SUFFIXES)] == ["a.jpg"]
    assert [one.path for one in walked([tmp_path], suffixes=VIDEO_SUFFIXES)] == ["b.MP4", "c.mkv"]
    assert SUFFIXES == IMAGE_SUFFIXES | VIDEO_SUFFIXES
    assert not IMAGE_SUFFIXES & VIDEO_SUFFIXES
    named = walked([tmp_path, tmp_path / "b.MP4"], suffixes=IMAGE_SUFFIXES)
    assert [one.path for one in named] == ["a.jpg", "b.MP4"]  # it was named


def test_a_source_tree_in_typescript_is_no_list_of_failed_videos(tmp_path):
    """Nor is a file of it that is named beside its folder passed over in silence."""
    packet = b"G" + bytes(187)
    for name, content in {
        "film.ts": packet * 30, "camera.MTS": (bytes(4) + packet) * 30, "code.ts": b"export const G = 1;\n" * 300,
        "module.mts": b"G", "empty.ts": b"", "other.mp4": b"text",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    (tmp_path / "gone.ts").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe.ts")
    assert [one.path for one in walked([tmp_path])] == ["camera.MTS", "film.ts", "gone.ts", "other.mp4", "pipe.ts"]
    named = walked([tmp_path, tmp_path / "code.ts", tmp_path / "film.ts"])
    assert sorted(one.path for one in named) == ["camera.MTS", "code.ts", "film.ts", "gone.ts", "other.mp4", "pipe.ts"]


def test_a_file_named_by_the_user_is_tried_whatever_its_name(tmp_path):
    (tmp_path / "no_suffix").write_bytes(b"x")
    (one,) = walked([tmp_path / "no_suffix"])
    assert (one.root, one.path) == (str(tmp_path), "no_suffix")


def test_the_same_file_twice_is_one(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    assert len(list(walked([tmp_path, tmp_path / "a.png", str(tmp_path) + "/"]))) == 1


def test_a_link_to_itself_and_folders_nested_beyond_python_s_recursion(tmp_path):
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "loop").symlink_to("loop")
    deep = tmp_path
    for _ in range(1200):
        deep = deep / "d"
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
        Path("deep.png").write_bytes(b"x")
    finally:
        os.chdir(here)
    found = [one.path for one in walked([tmp_path])]
    subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # pytest's own clean-up recurses
    assert found == ["loop.png", "d/" * 1200 + "deep.png"]


def test_folders_that_link_to_one_another_are_each_walked_once(tmp_path):
    for i in range(7):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "a.png").write_bytes(b"x")
    for i in range(7):
        for j in range(7):
            (tmp_path / f"{i}" / f"to{j}").symlink_to(tmp_path / f"{j}")
    assert len(list(walked([tmp_path]))) == 7
    assert len(list(walked([tmp_path, tmp_path / "3"]))) == 7


def test_a_store_is_left_out_and_said_unless_it_is_that_which_is_written(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "shard-000001.parquet").touch()
    notes = []
    assert walked([tmp_path], on_note=notes.append) == []
    assert notes == [f"{tmp_path / 'store'} is a store: it is left out"]
    assert walked([tmp_path], on_note=notes.append, out=str(tmp_path / "store")) == []
    assert len(notes) == 1


def test_loops_of_links_end_and_other_links_are_followed(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"x")
    (tmp_path / "photos" / "loop").symlink_to(tmp_path / "photos")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.png").write_bytes(b"x")
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "dangling.png").symlink_to(tmp_path / "nothing")
    assert [one.path for one in walked([tmp_path / "photos"])] == ["a.png", "dangling.png", "linked/b.png"]


def test_no_such_path(tmp_path):
    with pytest.raises(UsageError, match="no file or folder at"):
        list(walked([tmp_path / "nowhere"]))


@pytest.mark.parametrize(
    "name",
    [
        b"plain.png",
        b"caf\xe9.png",
        "café.png".encode(),
        b"new\nline.png",
        b"\xff\xfe.png",
        b"a//xff.png",
        "猫.png".encode(),
    ],
)
def test_any_name_comes_back(name):
    text = os.fsdecode(name)
    stored = stored_name(os.path.normpath(text))
    stored.encode("utf-8")
    assert name_on_disk(stored) == os.path.normpath(text)


def test_a_name_that_is_not_utf8_is_read(tmp_path, photo):
    os.mkdir(os.fsencode(tmp_path) + b"/d\xe9")
    with open(os.fsencode(tmp_path) + b"/d\xe9/caf\xe9.png", "wb") as stream:
        stream.write(encoded(photo))
    (one,) = walked([tmp_path])
    assert one.path == "d//xe9/caf//xe9.png"
    assert same_rgb(images.decode(read(one).data), photo)


# ------------------------------------------------------------------------------------------------------ the door


def photos_in(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, ns=(5, 5))


def sources(folder: Path) -> list:
    """Local folders, and the fake that stands for any source: they agree on what goes through the door."""
    photos_in(folder, "a.png", "b.png", "x/c.png")
    root = str(folder)
    fake = FakeSource({(root, name): (1, 5) for name in ("a.png", "b.png", "x/c.png")})
    return [LocalFolders([folder]), fake]


@pytest.mark.parametrize("which", [0, 1], ids=["local", "fake"])
def test_a_source_lists_each_folder_once_with_size_and_version(tmp_path, which):
    source = sources(tmp_path)[which]
    listings = list(source.list({}))
    assert [(one.root, one.path, one.number, one.known, one.complete) for one in listings] == [
        (str(tmp_path), "", 2, False, True), (str(tmp_path), "x", 1, False, True)
    ]  # fmt: skip
    entries = [entry for one in listings for entry in one.entries()]
    assert [(entry.path, entry.size, entry.version, entry.mtime_ns) for entry in entries] == [
        ("a.png", 1, "5", 5), ("b.png", 1, "5", 5), ("x/c.png", 1, "5", 5)
    ]  # fmt: skip
    assert source.scope.covers((str(tmp_path), "x"))
    assert not source.scope.covers((str(tmp_path) + "y", ""))
    assert source.fetch(entries[2]) == tmp_path / "x" / "c.png"


@pytest.mark.parametrize("which", [0, 1], ids=["local", "fake"])
def test_a_folder_whose_digest_is_known_is_not_listed_out(tmp_path, which):
    source = sources(tmp_path)[which]
    first, second = source.list({})
    again = list(source.list({first.folder: first.digest, second.folder: "another"}))
    assert [(one.known, one.lines, one.number) for one in again] == [(True, (), 2), (False, second.lines, 1)]
    assert again[1].digest == second.digest


@pytest.mark.parametrize("which", [0, 1], ids=["local", "fake"])
def test_a_source_says_of_stored_items_whether_they_exist(tmp_path, which):
    source, root = sources(tmp_path)[which], str(tmp_path)
    found = source.stat([(root, "a.png"), (root, "gone.png")])
    assert (found[root, "a.png"].state, found[root, "a.png"].entry) == ("present", Entry(root, "a.png", 1, "5", 5))
    assert (found[root, "gone.png"].state, found[root, "gone.png"].entry) == ("absent", None)


@pytest.mark.parametrize(
    ("path", "state", "empty"),
    [
        ("a.png", "present", None),
        ("gone.png", "absent", None),
        ("no folder/gone.png", "absent", None),
        ("a.png/gone.png", "absent", None),  # a file where a folder was
        ("disk/gone.png", "unknown", "disk"),
        ("disk/deep/er/gone.png", "unknown", "disk"),
        ("dangling.png", "unknown", None),
        ("loop.png", "unknown", None),
    ],
)
def test_only_what_can_be_told_to_be_absent_is(tmp_path, path, state, empty):
    photos_in(tmp_path, "a.png")
    (tmp_path / "disk").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop.png").symlink_to("loop.png")
    found = LocalFolders([tmp_path]).stat([(str(tmp_path), path)])[str(tmp_path), path]
    assert (found.state, found.empty_folder) == (state, None if empty is None else str(tmp_path / empty))


def test_paths_in_which_nothing_was_found_are_in_the_scope_and_cover_nothing(tmp_path):
    photos_in(tmp_path, "full/a.png")
    (tmp_path / "empty").mkdir()
    source = LocalFolders([tmp_path / "full", tmp_path / "empty", tmp_path / "full"])
    list(source.list({}))
    assert source.scope.empty == (str(tmp_path / "empty"),)  # not the path that was walked already
    assert not source.scope.covers((str(tmp_path / "empty"), ""))
    assert source.scope.covers((str(tmp_path / "full"), "below"))


def test_what_lies_within_a_root_of_the_store_is_stored_under_it(tmp_path):
    photos_in(tmp_path, "x/y/a.png", "x/b.png")
    roots = frozenset({str(tmp_path / "x")})
    for paths in ([tmp_path], [tmp_path / "x"], [tmp_path / "x" / "y", tmp_path / "x" / "b.png"]):
        found = {(one.root, one.path) for one in walked(paths, roots=roots)}
        assert found == {(str(tmp_path / "x"), "y/a.png"), (str(tmp_path / "x"), "b.png")}
    assert root_of(str(tmp_path / "x" / "y"), roots | {str(tmp_path)}) == str(tmp_path / "x")  # the deepest
    assert root_of("/elsewhere", roots) is None


def test_files_named_by_themselves_are_a_listing_that_is_not_complete(tmp_path):
    photos_in(tmp_path, "a.png", "x.dat")
    (listing,) = LocalFolders([tmp_path / "x.dat"]).list({})
    assert (listing.complete, [one.path for one in listing.entries()]) == (False, ["x.dat"])
    whole, single = LocalFolders([tmp_path, tmp_path / "x.dat", tmp_path / "a.png"]).list({})
    assert (whole.complete, [one.path for one in whole.entries()]) == (True, ["a.png"])
    assert (single.complete, [one.path for one in single.entries()]) == (False, ["x.dat"])


def test_links_of_a_path_are_resolved_and_a_files_own_name_is_kept(tmp_path):
    photos_in(tmp_path, "real/a.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "b.png").symlink_to("a.png")
    assert starts_of([tmp_path / "link", tmp_path / "link" / "b.png"]) == [
        str(tmp_path / "real"), str(tmp_path / "real" / "b.png")
    ]  # fmt: skip


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_said(tmp_path):
    photos_in(tmp_path, "a.png", "x/b.png")
    (tmp_path / "x").chmod(0)
    notes = []
    try:
        assert [one.path for one in walked([tmp_path], on_note=notes.append)] == ["a.png"]
    finally:
        (tmp_path / "x").chmod(0o755)
    assert notes == [f"{tmp_path / 'x'} cannot be read (Permission denied): its items are left as they are"]


def test_a_folder_that_vanishes_while_it_is_walked_is_said(tmp_path, monkeypatch):
    photos_in(tmp_path, "a.png", "x/b.png")
    real = os.scandir

    def scandir(at):
        if Path(os.readlink(f"/proc/self/fd/{at}")).name == "x":
            raise OSError(116, "Stale file handle")
        return real(at)

    monkeypatch.setattr("qvsplit.sources.folders.os.scandir", scandir)
    notes = []
    assert [one.path for one in walked([tmp_path], on_note=notes.append)] == ["a.png"]
    assert notes == [f"{tmp_path / 'x'} cannot be read (Stale file handle): its items are left as they are"]


@pytest.fixture
def open_folder():
    """A folder that everybody may enter: pytest's are for their owner alone."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def readable_by_nobody(folder: Path) -> tuple[dict, list[str]]:
    """What somebody without rights lists there: by path, size, version and whether it may be read; and the notes."""

    def listed():
        notes = []
        found = {one.path: [one.size, one.version, one.readable] for one in walked([folder], on_note=notes.append)}
        return found, notes

    return as_nobody(listed)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_whether_a_file_may_be_read_is_listed_and_is_no_other_version_of_it(open_folder):
    photos_in(open_folder, "a.png", "b.png", "x/c.png", "y/d.png")
    for name, mode in (("a.png", 0o600), ("b.png", 0o604), ("x", 0o700), ("y", 0o744)):
        (open_folder / name).chmod(mode)
    found, notes = readable_by_nobody(open_folder)
    assert found == {"a.png": [1, "5", False], "b.png": [1, "5", True], "y/d.png": [-1, None, True]}
    assert notes == [f"{open_folder / 'x'} cannot be read (Permission denied): its items are left as they are"]
    before = next(LocalFolders([open_folder]).list({})).digest  # as root
    assert as_nobody(lambda: next(LocalFolders([open_folder]).list({})).digest) != before
    presence = as_nobody(
        lambda: LocalFolders([open_folder]).stat([(str(open_folder), "a.png")]).popitem()[1].entry.readable
    )
    assert presence is False


class Scan(list):
    """What os.scandir gives, when all of it has been read."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_a_disk_that_goes_while_it_is_walked_is_no_items_fault(tmp_path, monkeypatch):
    """Nor are items absent that were below a folder which could not be listed, though nothing is there any more."""
    photos_in(tmp_path, "a.png", "disk/b.png", "disk/deep/c.png", "other/d.png")
    real = os.scandir

    class Gone:
        def __init__(self, entry):
            self.name, self.is_dir = entry.name, entry.is_dir
            self.stat = lambda: (_ for _ in ()).throw(OSError(errno.ENOTCONN, "Transport endpoint is not connected"))

    def scandir(at):
        entries = list(real(at))
        return Scan(map(Gone, entries) if Path(os.readlink(f"/proc/self/fd/{at}")).name == "disk" else entries)

    notes = []
    source = LocalFolders([tmp_path], on_note=notes.append)
    with monkeypatch.context() as going:
        going.setattr("qvsplit.sources.folders.os.scandir", scandir)
        assert [one.path for listing in source.list({}) for one in listing.entries()] == ["a.png", "other/d.png"]
    assert notes == [
        f"{tmp_path / 'disk'} cannot be read (Transport endpoint is not connected): its items are left as they are"
    ]
    shutil.rmtree(tmp_path / "disk")  # as an automounter removes the place of a disk
    (tmp_path / "other" / "d.png").unlink()
    (tmp_path / "other" / "e.png").touch()
    paths = ["disk/b.png", "disk/deep/c.png", "other/d.png"]
    found = source.stat([(str(tmp_path), path) for path in paths])
    assert [found[str(tmp_path), path].state for path in paths] == ["unknown", "unknown", "absent"]


def test_nothing_is_absent_below_a_path_that_was_given_and_has_gone(tmp_path):
    photos_in(tmp_path, "stick/a.png", "another/b.png")
    source = LocalFolders([tmp_path / "stick", tmp_path / "another"])
    shutil.rmtree(tmp_path / "stick")
    notes = [listing.folder for listing in source.list({})]
    assert notes == [(str(tmp_path / "another"), "")]  # and the path is not taken for a file
    found = source.stat([(str(tmp_path / "stick"), "x.dat"), (str(tmp_path / "another"), "x.dat")])
    assert [one.state for one in found.values()] == ["unknown", "absent"]


def test_a_file_that_is_deleted_while_its_folder_is_read_is_no_item(tmp_path, monkeypatch):
    photos_in(tmp_path, "a.png", "b.png")
    (tmp_path / "dangling.png").symlink_to("nothing")
    real = os.scandir

    def scandir(at):
        entries = Scan(real(at))
        (tmp_path / "b.png").unlink()
        return entries

    monkeypatch.setattr("qvsplit.sources.folders.os.scandir", scandir)
    assert [one.path for one in walked([tmp_path])] == ["a.png", "dangling.png"]


def test_a_path_that_cannot_be_looked_at_is_not_said_to_be_missing(tmp_path, monkeypatch):
    def stat(path, **how):
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    monkeypatch.setattr("qvsplit.sources.folders.os.stat", stat)
    with pytest.raises(UsageError, match=r"cannot be looked at \(Transport endpoint is not connected\); mount"):
        starts_of([tmp_path])


def test_a_file_above_the_target_of_a_link_is_the_one_that_opens(tmp_path):
    photos_in(tmp_path, "a.png")
    photos_in(tmp_path, "real/deep/b.png")
    photos_in(tmp_path, "real/a.png")
    (tmp_path / "link").symlink_to("real/deep")
    assert starts_of([tmp_path / "link" / ".." / "a.png"]) == [str(tmp_path / "real" / "a.png")]
