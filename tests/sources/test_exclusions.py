"""What walks leave out: by default, by patterns and by ignore files, held against git; and what is counted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvsplit.errors import UsageError
from qvsplit.runtime.names import stored_name
from qvsplit.sources.exclusions import FOLDERS_LEFT_OUT, IGNORE_FILE, Exclusions
from qvsplit.sources.folders import IMAGE_SUFFIXES, LocalFolders
from tests.support.processes import as_nobody


def make(folder: Path, *names: str, **ignore: str) -> Path:
    """Files of these names below `folder`, and ignore files: `top` in the folder itself."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    for below, content in ignore.items():
        (folder / ("" if below == "top" else below) / IGNORE_FILE).write_text(content)
    return folder


def walked(*paths, **options) -> list[str]:
    source = LocalFolders(paths, **options)
    return [entry.path for listing in source.list({}) for entry in listing.entries()]


def left_out(*paths, **options):
    source = LocalFolders(paths, **options)
    list(source.list({}))
    return source.scope.left_out


# ------------------------------------------------------------------------------------------------------- by default

ELSEWHERE = (".Trash-1000", ".Trashes", ".thumbnails", ".@__thumb", ".AppleDouble", ".sync", ".stversions", ".dtrash",
             ".snapshots", "$Recycle.Bin", "LOST+FOUND", "FOUND.000")  # fmt: skip


@pytest.mark.parametrize("name", [*FOLDERS_LEFT_OUT, *ELSEWHERE])
def test_folders_that_no_album_means_are_left_out_unless_named(tmp_path, name):
    make(tmp_path, "a.jpg", f"x/{name}/b.jpg", f"x/{name}/deep/c.jpg")
    assert walked(tmp_path) == ["a.jpg"]
    assert left_out(tmp_path).folders == (not name.startswith("."))
    assert walked(tmp_path / "x" / name) == ["b.jpg", "deep/c.jpg"]
    assert walked(tmp_path, tmp_path / "x" / name / "b.jpg") == ["a.jpg", f"x/{name}/b.jpg"]
    if not name.startswith("."):
        assert walked(tmp_path, exclude=[f"!{name}"]) == ["a.jpg", f"x/{name}/b.jpg", f"x/{name}/deep/c.jpg"]


@pytest.mark.parametrize("name", ["eaDir", "recycle", "lost", "found.1", "found.0000", "snapshot", "my #recycle"])
def test_other_folders_are_taken(tmp_path, name):
    make(tmp_path, f"{name}/b.jpg")
    assert walked(tmp_path) == [f"{name}/b.jpg"]


def test_a_file_of_such_a_name_is_no_folder(tmp_path):
    make(tmp_path, "#recycle.jpg", "@eaDir.png")
    assert walked(tmp_path) == ["#recycle.jpg", "@eaDir.png"]


# --------------------------------------------------------------------------------------------- patterns, against git

NAMES = ("a.jpg", "b.png", "raw/a.jpg", "raw/keep/a.jpg", "raw/keep/b.png", "2024/raw/c.jpg", "2024/d e.jpg", "2024/#x.jpg",
         "2024/!y.jpg", "2024/[1].jpg", "2024/deep/er/a.jpg", "foo.jpg/z.jpg")  # fmt: skip
PATTERNS = ("*.png", "raw/", "/raw", "raw/*", "!raw/keep/", "!raw/keep", "2024/**/a.jpg", "**/raw", "\\#x.jpg", "\\!y.jpg",
            "[[]1].jpg", "d?e.jpg", "deep", "*", "!a.jpg", "!*/", "/*", "*.jpg", "*.jpg/", "# remark", "", "d e.jpg ",
            "2024/*", "!2024/raw", "er/a.jpg", "/2024/deep/**", "[!a]*.jpg", "[^b-z].png", "[[:alpha:]].*",
            "[]a].jpg", "a[.]jpg", "[a-]*", "2024/[\\[]*", "**/deep/**/a.jpg", "raw**", "***.png", "a\\.jpg")  # fmt: skip


def by_git(folder: Path, patterns=()) -> list[str]:
    words = [word for pattern in patterns for word in ("-x", pattern)]
    done = subprocess.run(
        ["git", "ls-files", "-z", "-o", f"--exclude-per-directory={IGNORE_FILE}", *words],
        cwd=folder, capture_output=True, check=True, env=os.environ | {"GIT_DIR": str(folder / ".git")},
    )  # fmt: skip
    found = done.stdout.decode().split("\0")[:-1]
    return sorted(name for name in found if not name.endswith(IGNORE_FILE))


@pytest.fixture(scope="module")
def tree():
    if shutil.which("git") is None:
        pytest.skip("git is not installed: there is nothing to compare with")
    with tempfile.TemporaryDirectory() as place:
        folder = make(Path(os.path.realpath(place)) / "tree", *NAMES)
        subprocess.run(["git", "init", "-q", folder], check=True)
        yield folder


@settings(max_examples=40, deadline=None)
@given(*[st.lists(st.sampled_from(PATTERNS), max_size=4)] * 3)
def test_patterns_mean_what_they_mean_to_git(tree, top, deeper, call):
    call = [one for one in call if one.strip() and not one.startswith("#")]  # which a call takes for names, or refuses
    (tree / IGNORE_FILE).write_text("\n".join(top))
    (tree / "raw" / IGNORE_FILE).write_text("\r\n".join(deeper))
    try:
        expected = by_git(tree, call)
        source = LocalFolders([tree], exclude=call)
        listed = {entry.path for listing in source.list({}) for entry in listing.entries()}
        assert sorted(listed) == expected
        stat = source.stat([(str(tree), name) for name in NAMES])
        assert {path for (_, path), found in stat.items() if not found.is_excluded} == listed
    finally:
        (tree / IGNORE_FILE).unlink()
        (tree / "raw" / IGNORE_FILE).unlink()


def matches(glob, path) -> bool:
    """What a pattern of letters, stars and slashes means, told slowly: every way that a star may be read is tried."""
    if isinstance(glob, str):
        folders = glob.removeprefix("/").split("/")
        return matches(folders if "/" in glob else ["**", *folders], path.split("/"))
    if not glob or not path:
        return not glob and not path
    if glob[0] == "**":
        return (matches(glob[1:], path) if glob[1:] else True) or matches(glob, path[1:])
    return name_matches(glob[0], path[0]) and matches(glob[1:], path[1:])


def name_matches(glob: str, name: str) -> bool:
    if glob[:1] == "*":
        return name_matches(glob[1:], name) or (bool(name) and name_matches(glob, name[1:]))
    return glob[:1] == name[:1] and (not glob or name_matches(glob[1:], name[1:]))


NAME = st.text("ab*", min_size=1, max_size=6)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.one_of(st.just("**"), NAME), min_size=1, max_size=6).map("/".join),
    st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=6).map("/".join),
)
def test_a_pattern_of_many_stars_means_what_trying_all_ways_says(glob, path):
    rules = Exclusions(["/"], [glob]).at("/").call
    assert (rules.excludes(f"/{path}", is_folder=False) is True) == matches(glob, path)


MANY = """
import sys
from qvsplit.sources.exclusions import Exclusions
file = {"name": "/" + "a" * 250, "folders": "/a" * 1500}[sys.argv[1]]
rules = Exclusions(["/"], [sys.argv[2]]).at("/").call
print(rules.excludes(file, is_folder=False), rules.excludes(file + "b", is_folder=False))
"""


@pytest.mark.parametrize(
    ("kind", "pattern", "expected"),
    [
        ("name", "*a" * 60 + "b", "None True"),
        ("name", "**/" * 60 + "b", "None None"),
        ("name", "*?[a]" * 60 + "b", "None True"),
        ("folders", "**/a/" * 60 + "b", "None None"),
        ("folders", "**/" * 60 + "ab", "None True"),
        ("folders", "**/*a*a/" * 60 + "b", "None None"),
        ("folders", "a/**/*/" * 60 + "*b", "None True"),
    ],
)
def test_a_pattern_of_many_stars_comes_to_an_end(kind, pattern, expected):
    """Else it takes longer than anybody lives."""
    done = subprocess.run([sys.executable, "-c", MANY, kind, pattern], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == (expected, "")


def test_patterns_of_a_call_are_relative_to_every_path_and_a_hash_is_a_name(tmp_path):
    for album in ("one", "two"):
        make(tmp_path / album, "raw/a.jpg", "x/raw/b.jpg", "#new/c.jpg", "d.jpg")
    paths = tmp_path / "one", tmp_path / "two"
    assert walked(*paths, exclude=["/raw", "#new"]) == ["d.jpg", "x/raw/b.jpg"] * 2
    assert left_out(*paths, exclude=["/raw", "#new", "d.*"]).files == 2


@pytest.mark.parametrize("form", ["Zu\u0308rich", "Z\u00fcrich"])
@pytest.mark.parametrize("typed", ["Zu\u0308rich/", "Z\u00fcrich/", "Z?rich", "\ufeffZ\u00fcrich"])
def test_either_form_of_unicode_matches(tmp_path, form, typed):
    make(tmp_path, "a.jpg", f"{form}/b.jpg", top=typed)
    assert walked(tmp_path) == ["a.jpg"]


def test_a_name_that_is_not_utf8_is_excluded_by_itself(tmp_path):
    name = os.fsdecode(b"\xff.jpg")
    make(tmp_path, "a.jpg", name)
    assert walked(tmp_path, exclude=[name]) == ["a.jpg"]
    assert walked(tmp_path, exclude=["a*"]) == [stored_name(name)]


# ------------------------------------------------------------------------------------------------------ ignore files


def test_an_ignore_file_holds_below_its_folder_wherever_a_walk_begins(tmp_path):
    make(tmp_path, "a.png", "x/b.png", "x/c.jpg", "x/y/d.png", "x/y/e.jpg", top="*.png\n/x/y/e.jpg\n", x="!b.png\n")
    assert walked(tmp_path) == ["x/b.png", "x/c.jpg"]
    assert walked(tmp_path / "x") == ["b.png", "c.jpg"]
    assert walked(tmp_path / "x" / "y") == []
    assert walked(tmp_path / "x" / "y", exclude=["!*.jpg"]) == ["e.jpg"]  # a call's patterns come before


def test_what_is_named_by_itself_is_taken(tmp_path):
    make(tmp_path, "x/a.jpg", "x/b.png", "x/y/c.jpg", top="x/\n*.gif\n", x="b.png\n")
    assert walked(tmp_path) == []
    assert walked(tmp_path / "x") == ["a.jpg", "y/c.jpg"]
    assert walked(tmp_path, tmp_path / "x" / "y") == ["c.jpg"]
    assert walked(tmp_path / "x", tmp_path / "x" / "b.png") == ["a.jpg", "y/c.jpg", "b.png"]
    assert walked(tmp_path / "x" / "b.png", exclude=["*"]) == ["b.png"]


def test_the_digest_of_a_folder_sees_every_change_of_patterns(tmp_path):
    make(tmp_path, "a.jpg", "b.png", "x/c.jpg")

    def digests(**options):
        listings = LocalFolders([tmp_path], **options).list({})
        return {listing.path: listing.digest for listing in listings}

    before = digests()
    assert digests(exclude=["*.gif"]).items().isdisjoint(before.items())
    assert digests(exclude=["*.gif"]) == digests(exclude=["*.gif"])
    (tmp_path / "x" / IGNORE_FILE).write_text("")
    assert digests() == before  # which says nothing
    (tmp_path / "x" / IGNORE_FILE).write_text("*.gif")
    assert digests()[""] == before[""] and digests()["x"] != before["x"]
    known = {(str(tmp_path), path): digest for path, digest in digests().items()}
    assert [listing.known for listing in LocalFolders([tmp_path]).list(known)] == [True, True]
    (tmp_path / IGNORE_FILE).write_text("*.gif")
    assert [listing.known for listing in LocalFolders([tmp_path]).list(known)] == [False, False]


@pytest.mark.parametrize("pattern", ["", "  ", "!", "\\", "[z-a]", "a[", "2024[/]raw"])
def test_a_pattern_that_is_none_is_refused(tmp_path, pattern):
    make(tmp_path, "a.jpg", "x/b.jpg")
    if pattern.strip():
        (tmp_path / "x" / IGNORE_FILE).write_text(f"*.gif\n{pattern}\n")
        notes = []
        assert walked(tmp_path, on_note=notes.append) == ["a.jpg"]
        assert len(notes) == 1 and f"x cannot be read (its {IGNORE_FILE}: " in notes[0]
        (tmp_path / "x" / "y").mkdir()
        with pytest.raises(UsageError, match=IGNORE_FILE):
            walked(tmp_path / "x" / "y")
        source = LocalFolders([tmp_path])
        list(source.list({}))
        assert source.stat([(str(tmp_path), "x/b.jpg")]).popitem()[1].is_excluded  # it is left as it is
    with pytest.raises(UsageError, match="`exclude`"):
        LocalFolders([tmp_path], exclude=[pattern])


def test_an_ignore_file_that_cannot_be_read_leaves_its_folder_as_it_is(tmp_path):
    make(tmp_path, "a.jpg", "x/b.jpg", "y/c.jpg")
    os.mkfifo(tmp_path / "x" / IGNORE_FILE)  # nobody writes into it: opening it must not wait
    (tmp_path / "y" / IGNORE_FILE).write_bytes(b"#" * (2 << 20))
    notes = []
    assert walked(tmp_path, on_note=notes.append) == ["a.jpg"]
    assert len(notes) == 2 and "is no file" in notes[0] and "is longer than" in notes[1]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_an_ignore_file_that_may_not_be_read():
    with tempfile.TemporaryDirectory() as place:  # pytest's folders are for their owner alone
        os.chmod(place, 0o755)
        folder = make(Path(os.path.realpath(place)), "a.jpg", "x/b.jpg", "x/y/c.jpg", x="*.gif")
        (folder / "x" / IGNORE_FILE).chmod(0)
        assert as_nobody(lambda: walked(folder)) == ["a.jpg"]
        said = as_nobody(lambda: walked(folder / "x" / "y"))
        assert said.startswith("UsageError") and said.endswith(f"x/{IGNORE_FILE}: cannot be read (Permission denied)")


# ---------------------------------------------------------------------------------------------------------- counting


def test_what_nothing_here_reads_is_counted_by_kind_once(tmp_path):
    make(tmp_path, "a.jpg", "a.CR2", "x/b.cr2", "x/c.NEF", "x/d.psd", "x/e.jxl", "x/f.svg", "x/g.pdf", "x/h.txt", "x/.i.cr2",
         "x/j.cr2/k.txt", "@eaDir/l.cr2", "x/m.ts", "x/n.json", "gone/o.cr2")  # fmt: skip
    os.symlink(tmp_path / "x", tmp_path / "link")
    found = left_out(tmp_path, tmp_path / "x", exclude=["gone"])
    assert found.kinds == {".cr2": 2, ".jxl": 1, ".nef": 1, ".pdf": 1, ".psd": 1, ".svg": 1}
    assert next(iter(found.kinds)) == ".cr2"  # the most first
    assert left_out(tmp_path, exclude=["*.cr2", "*.CR2", "gone"]).kinds.keys() == found.kinds.keys() - {".cr2"}
    assert (found.files, found.folders) == (0, 2)


def test_videos_that_are_not_taken_are_left_out(tmp_path):
    make(tmp_path, "a.jpg", "b.MOV", "c.mp4", "d.ts")
    assert left_out(tmp_path, suffixes=IMAGE_SUFFIXES).kinds == {".mov": 1, ".mp4": 1}
    assert left_out(tmp_path).kinds == {}


def test_a_file_that_was_named_is_not_left_out(tmp_path):
    make(tmp_path, "a.jpg", "b.psd", "c.psd")
    assert left_out(tmp_path, tmp_path / "b.psd").kinds == {".psd": 1}
    assert left_out(tmp_path / "b.psd").kinds == {}


def test_known_folders_are_counted_too(tmp_path):
    make(tmp_path, "a.jpg", "b.psd", "c.gif", "@eaDir/x.jpg")
    source = LocalFolders([tmp_path], exclude=["*.gif"])
    known = {listing.folder: listing.digest for listing in source.list({})}
    before = source.scope.left_out
    assert (before.kinds, before.files, before.folders) == ({".psd": 1}, 1, 1)
    assert all(listing.known for listing in source.list(known))
    assert source.scope.left_out == before


def test_a_path_in_which_everything_is_excluded_is_not_empty(tmp_path):
    make(tmp_path, "x/a.jpg", "y/@eaDir/b.jpg", "z/c.txt")
    source = LocalFolders([tmp_path / "x", tmp_path / "y", tmp_path / "z"], exclude=["a.jpg"])
    assert [listing.number for listing in source.list({})] == [0, 0, 0]
    assert source.scope.empty == (str(tmp_path / "z"),)
