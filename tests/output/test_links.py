"""A folder of links: kept in step, nobody else's file touched, put right after a run that was killed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qvsplit.errors import DiskError, StoreDamaged, StoreInUse, UsageError
from qvsplit.output.links import IGNORE_FILE, MANIFEST, link_files


@pytest.fixture
def photos(tmp_path) -> Path:
    """Files of which two have one name, and one that has no name in UTF-8."""
    for name in ("a/IMG_1.jpg", "b/IMG_1.jpg", "a/two\nlines.jpg", "c/odd-\udcff.jpg", "c/é.jpg"):
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode("utf-8", "surrogateescape"))
    return tmp_path / "photos"


@pytest.fixture
def album(tmp_path) -> Path:
    return tmp_path / "album"


def files(folder: Path) -> list[str]:
    return sorted(str(file) for file in folder.rglob("*") if file.is_file())


def links(folder: Path) -> dict[str, str]:
    return {name: os.readlink(folder / name) for name in os.listdir(folder) if (folder / name).is_symlink()}


def test_a_link_to_every_file(photos, album):
    done = link_files(files(photos), album)
    assert (done.made, done.removed, done.kept, done.missing) == (5, 0, 0, [])
    assert sorted(links(album).values()) == files(photos)
    assert {"two\nlines.jpg", "odd-\udcff.jpg", "é.jpg", "IMG_1.jpg"} <= links(album).keys()
    for name, target in links(album).items():
        assert (album / name).read_bytes() == Path(target).read_bytes()
    assert sorted(set(os.listdir(album)) - links(album).keys()) == [IGNORE_FILE, MANIFEST]
    assert (album / IGNORE_FILE).read_text().endswith("\n*\n")  # that extract finds no file twice


def test_a_rerun_makes_what_is_new_and_removes_what_is_not_wanted(photos, album):
    everything = files(photos)
    link_files(everything, album)
    before = {name: os.lstat(album / name).st_mtime_ns for name in os.listdir(album)}
    done = link_files(everything, album)
    assert (done.made, done.removed, done.kept) == (0, 0, 5)
    assert {name: os.lstat(album / name).st_mtime_ns for name in os.listdir(album)} == before  # nothing was written
    done = link_files(everything[1:3], album)
    assert (done.made, done.removed, done.kept) == (0, 3, 2)
    assert sorted(links(album).values()) == everything[1:3]
    (photos / "new.jpg").touch()
    done = link_files([*everything[1:3], str(photos / "new.jpg")], album)
    assert (done.made, done.removed, done.kept) == (1, 0, 2)
    assert link_files([], album).removed == 3
    assert links(album) == {}


def test_a_link_keeps_its_name_whatever_comes_and_goes(photos, album):
    first, second = str(photos / "a/IMG_1.jpg"), str(photos / "b/IMG_1.jpg")
    link_files([second], album)
    assert links(album) == {"IMG_1.jpg": second}
    link_files([first, second], album)
    by_target = {target: name for name, target in links(album).items()}
    assert by_target[second] == "IMG_1.jpg"
    assert by_target[first].startswith("IMG_1.") and by_target[first].endswith(".jpg")
    link_files([first], album)
    assert links(album) == {by_target[first]: first}
    link_files([first, second], album)
    assert links(album) == {by_target[first]: first, "IMG_1.jpg": second}


def test_names_that_differ_only_in_case_or_in_the_form_of_an_accent_are_told_apart(photos, album):
    (photos / "b/img_1.JPG").touch()
    (photos / "b/e\u0301.jpg").touch()
    link_files(files(photos), album)
    assert sorted(links(album).values()) == files(photos)
    assert len({name.casefold() for name in links(album)}) == 7
    assert "é.jpg" not in links(album) or "e\u0301.jpg" not in links(album)


def test_a_long_name_that_clashes_stays_a_name_of_a_file(tmp_path, album):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / ("é" * 125 + ".jpg")).touch()
    wanted = sorted(map(str, (*(tmp_path / "a").iterdir(), *(tmp_path / "b").iterdir())))
    link_files(wanted, album)
    assert sorted(links(album).values()) == wanted


def test_a_file_of_the_users_is_left_alone(photos, album):
    link_files([str(photos / "a/IMG_1.jpg")], album)
    (album / "mine.txt").write_text("mine")
    (album / "my link").symlink_to(photos)
    (album / "é.jpg").write_text("mine too")
    os.unlink(album / "IMG_1.jpg")
    (album / "IMG_1.jpg").write_text("where a link was")
    link_files(files(photos), album)
    assert sorted(target for name, target in links(album).items() if name != "my link") == files(photos)
    link_files([], album)
    assert links(album) == {"my link": str(photos)}
    assert (album / "mine.txt").read_text() == "mine"
    assert (album / "é.jpg").read_text() == "mine too"
    assert (album / "IMG_1.jpg").read_text() == "where a link was"


def test_a_link_that_its_user_has_pointed_elsewhere_is_the_users(photos, album):
    link_files([str(photos / "a/IMG_1.jpg")], album)
    os.unlink(album / "IMG_1.jpg")
    (album / "IMG_1.jpg").symlink_to(photos / "c")
    link_files([], album)
    assert links(album) == {"IMG_1.jpg": str(photos / "c")}


def test_a_folder_of_other_files_is_refused(photos, album):
    album.mkdir()
    (album / "holiday.jpg").touch()
    with pytest.raises(UsageError, match="has files that qvsplit did not make \\(holiday.jpg\\)"):
        link_files(files(photos), album)
    assert os.listdir(album) == ["holiday.jpg"]
    with pytest.raises(UsageError, match="not a folder"):
        link_files(files(photos), album / "holiday.jpg")
    with pytest.raises(UsageError, match="not a folder"):
        link_files(files(photos), album / "no" / "such")


def test_an_ignore_file_of_the_users_stays(photos, album):
    album.mkdir()
    (album / IGNORE_FILE).write_text("*.png\n")
    link_files(files(photos), album)
    assert (album / IGNORE_FILE).read_text() == "*.png\n"


def test_files_that_do_not_exist_have_no_link(photos, album):
    link_files(files(photos), album)
    gone = str(photos / "a/IMG_1.jpg")
    wanted = files(photos)
    os.unlink(gone)
    done = link_files(wanted, album)
    assert (done.missing, done.removed, done.kept) == ([gone], 1, 4)
    assert sorted(links(album).values()) == files(photos)


def test_files_of_the_folder_itself_are_not_linked(photos, album):
    link_files(files(photos), album)
    before = links(album)
    link_files([*files(photos), str(album / "IMG_1.jpg")], album)
    assert links(album) == before


def test_relative_links_open_after_both_have_moved(photos, album, tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "by").symlink_to("in/deep")  # `..` of a link is not where the link is
    link_files(files(photos), tmp_path / "by" / "album", relative=True)
    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "in", tmp_path / "moved" / "in")
    shutil.move(photos, tmp_path / "moved" / "photos")
    moved = tmp_path / "moved" / "in" / "deep" / "album"
    assert sorted(os.path.realpath(moved / name) for name in links(moved)) == files(tmp_path / "moved" / "photos")
    done = link_files(files(tmp_path / "moved" / "photos"), moved, relative=True)
    assert (done.made, done.removed, done.kept) == (0, 0, 5)
    done = link_files(files(tmp_path / "moved" / "photos"), moved)
    assert (done.made, done.kept) == (5, 0)
    assert sorted(links(moved).values()) == files(tmp_path / "moved" / "photos")


def test_a_manifest_that_cannot_be_read_is_refused(photos, album):
    link_files(files(photos), album)
    manifest = json.loads((album / MANIFEST).read_text())
    assert sorted(map(tuple, manifest["links"])) == sorted(links(album).items())
    (album / "sub").mkdir()
    (album / "sub" / "x").symlink_to("y")
    for text in (
        "",
        "{}",
        "[]",
        '{"format": 2, "links": []}',
        '{"format": 1, "links": [["sub/x", "y"]]}',
        '{"format": 1, "links": [["../x", "y"]]}',
        "[" * 200_000,
    ):
        (album / MANIFEST).write_text(text)
        with pytest.raises(StoreDamaged, match="is damaged"):
            link_files([], album)
    assert sorted(links(album).values()) == files(photos)
    assert (album / "sub" / "x").is_symlink()


def test_two_runs_never_work_in_one_folder_at_once(photos, album):
    link_files([], album)
    descriptor = os.open(album, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(StoreInUse):
            link_files(files(photos), album)
    finally:
        os.close(descriptor)
    assert link_files(files(photos), album).made == 5


def test_a_folder_that_cannot_be_written(photos, album, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    link_files([], album)
    monkeypatch.setattr(os, "symlink", refused)
    with pytest.raises(DiskError, match="album: cannot be written"):
        link_files(files(photos), album)
    monkeypatch.undo()
    assert link_files(files(photos), album).made == 5


KILLED = """
import os, signal, sys
from pathlib import Path
from qvsplit.output.links import link_files

left = int(sys.argv[1])

def dying(call):
    def counted(*given, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*given, **named)
    return counted

for name in ("symlink", "unlink", "replace", "fsync"):
    setattr(os, name, dying(getattr(os, name)))
link_files(sys.argv[3:], Path(sys.argv[2]))
"""


def test_a_run_that_is_killed_anywhere_is_put_right_by_the_next(photos, tmp_path):
    """Killed before each of its calls that change the folder, one after another."""
    everything = files(photos)
    for number in range(1, 40):
        album = tmp_path / f"album-{number}"
        link_files(everything[:3], album)
        if number % 2:
            shutil.rmtree(album)  # it dies in a new folder
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(number), album, *everything[2:]], capture_output=True, text=True
        )
        assert done.returncode in (0, -9), done.stderr
        link_files(everything[2:], album)
        assert sorted(links(album).values()) == everything[2:], number
        assert sorted(set(os.listdir(album)) - links(album).keys()) == [IGNORE_FILE, MANIFEST]
        link_files([], album)
        assert links(album) == {}
        if done.returncode == 0 and number % 2 == 0:
            break
    assert 8 < number < 39
