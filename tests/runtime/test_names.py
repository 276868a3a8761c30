"""Names of files as they are stored, and as the file system has them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvsplit.errors import escaped
from qvsplit.runtime.names import (
    absolute,
    file_on_disk,
    is_within,
    name_on_disk,
    storable_mtime,
    stored_name,
    typed_name,
)


@given(st.binary(max_size=60))
def test_every_name_a_file_system_can_have_comes_back(data):
    name = os.path.normpath(os.fsdecode(data.replace(b"\0", b"")) or "x")
    if name.startswith("//"):  # POSIX keeps two slashes at the start, and only there
        name = name[1:]
    stored = stored_name(name)
    assert stored.encode().decode() == stored  # valid UTF-8
    assert name_on_disk(stored) == name


def test_only_bytes_that_are_no_utf_8_are_escaped():
    assert stored_name("ü 猫/a.png") == "ü 猫/a.png"
    assert stored_name(os.fsdecode(b"a/\xff\xfe.png")) == "a///xff//xfe.png"
    assert name_on_disk("a/x41.png") == "a/x41.png"


@pytest.mark.parametrize(
    "name", ["ü 猫/a.png", "a  b\u202f\u3000.png", "a\nb\tc\x1b\u202e", os.fsdecode(b"a/\xff.png"), "a\\x41"]
)
def test_a_name_can_be_typed_as_it_is_stored_or_printed(name):
    stored = stored_name(name)
    assert typed_name(escaped(stored)) == typed_name(escaped(name)) == stored


def test_a_name_is_stored_alike_under_every_locale():
    """Without UTF-8 Python reads names byte by byte: another nightly locale would have moved every file."""
    code = (
        "import os, sys\nfrom qvsplit.runtime.names import name_on_disk, stored_name, typed_name\n"
        "assert sys.getfilesystemencoding() == 'ascii'\nname = sys.argv[1]\nstored = stored_name(name)\n"
        "assert name_on_disk(stored) == name\nassert typed_name(name) == typed_name(stored) == stored\n"
        "print(ascii(stored))"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    name = "ü 猫\u202f".encode() + b"\xff.png"
    done = subprocess.run(
        [sys.executable, "-c", code, name], capture_output=True, text=True, check=False, env=environment
    )
    assert (done.stdout, done.stderr) == ("'\\xfc \\u732b\\u202f//xff.png'\n", "")


def test_a_file_lies_below_its_root():
    assert file_on_disk("/photos", "a/b.png") == "/photos/a/b.png"
    assert os.fsencode(file_on_disk("/photos//xff", "//xfe.png")) == b"/photos\xff/\xfe.png"


@pytest.mark.parametrize(
    ("path", "folder", "within"),
    [("/a", "/a", True), ("/a/b", "/a", True), ("/ab", "/a", False), ("/a", "/a/b", False), ("/a", "/", True)],
)
def test_within_is_by_whole_names(path, folder, within):
    assert is_within(path, folder) is within


@pytest.mark.parametrize("mtime", [0, -5, 1 << 62, 1 << 80, -(1 << 80)])
def test_times_fit_into_64_bits(mtime):
    clipped = storable_mtime(mtime)
    assert -(1 << 63) <= clipped < 1 << 63
    assert clipped == mtime or abs(mtime) > 1 << 62


@pytest.mark.parametrize(
    "name", ["link/../x.jpg", "link/../other/./y.jpg", "link/x.jpg", "./x.jpg", "link//x.jpg", "real/deep/../../x.jpg"]
)
def test_a_whole_path_opens_what_the_name_opens(tmp_path, monkeypatch, name):
    """Behind a link `..` is the folder above its target, not the one that the link is in."""
    for place in ("x.jpg", "real/x.jpg", "real/deep/x.jpg", "real/other/y.jpg", "other/y.jpg"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(place)
    (tmp_path / "link").symlink_to("real/deep")
    monkeypatch.chdir(tmp_path)
    whole = absolute(name)
    assert os.path.isabs(whole)
    assert os.path.samefile(whole, name)
    assert ("link" in whole) is (name in ("link/x.jpg", "link//x.jpg"))  # kept where it can be
    assert absolute(tmp_path / name) == whole
