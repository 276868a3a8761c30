"""Which folders a store is kept up to date with."""

from __future__ import annotations

import errno
import os

import pytest

from qvsplit.errors import DiskError, StoreDamaged
from qvsplit.store import layout
from qvsplit.store.storage import LocalStorage
from qvsplit.store.walked import Walk, forget_walked, note_walk, walks


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path / "store")


def test_the_last_word_on_each_folder_counts(storage):
    assert walks(storage) is None
    note_walk(storage, Walk(("/b",)))
    note_walk(storage, Walk(("/a/\udcff",), ("*.gif",), videos=False))
    note_walk(storage, Walk(("/b",), ("x/",)))
    assert walks(storage) == [Walk(("/a/\udcff",), ("*.gif",), videos=False), Walk(("/b",), ("x/",))]


def test_folders_of_one_run_stay_together_in_its_order(storage):
    note_walk(storage, Walk(("/c", "/a", "/b")))
    assert walks(storage) == [Walk(("/c", "/a", "/b"))]
    note_walk(storage, Walk(("/a", "/d"), videos=False))
    assert walks(storage) == [Walk(("/a", "/d"), videos=False), Walk(("/c", "/b"))]
    note_walk(storage, Walk(("/b", "/c")))
    assert walks(storage) == [Walk(("/a", "/d"), videos=False), Walk(("/b", "/c"))]


def test_only_what_is_new_is_written(storage):
    note_walk(storage, Walk(("/b", "/a")))
    file = storage.folder / layout.WALKED
    before = file.stat()
    note_walk(storage, Walk(("/b", "/a")))
    note_walk(storage, Walk(()))
    forget_walked(storage, ["/c", "/b/sub"])
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_that_there_is_no_folder_is_something_else_than_not_to_know_it(storage):
    forget_walked(storage, ["/a"])
    assert walks(storage) is None
    note_walk(storage, Walk(()))
    assert walks(storage) == []


def test_what_is_forgotten_leaves_no_trace(storage):
    note_walk(storage, Walk(("/b/secret", "/b/secrets", "/c")))
    note_walk(storage, Walk(("/b/secret/deep",)))
    forget_walked(storage, ["/b/secret"])
    assert walks(storage) == [Walk(("/b/secrets", "/c"))]
    assert '"/b/secret' not in (storage.folder / layout.WALKED).read_text().replace("/b/secrets", "")
    forget_walked(storage, ["/"])
    assert walks(storage) == []  # it is known that there is none


NONE = [
    "", "{}", "1", "null", '"/a"', '["/a"]', "[1]", "[{}]", '{"/a": {"exclude": [], "videos": true}}', "\x00", "[" * 100_000,
    '[{"folders": "/a", "exclude": [], "videos": true}]', '[{"folders": [1], "exclude": [], "videos": true}]',
    '[{"folders": ["/a"], "exclude": ["x", 1], "videos": true}]', '[{"folders": ["/a"], "exclude": [], "videos": 1}]',
]  # fmt: skip


@pytest.mark.parametrize("content", NONE)
def test_a_list_that_is_none_is_damage_to_who_reads_and_begun_again_by_who_writes(storage, content):
    note_walk(storage, Walk(("/a",)))
    file = storage.folder / layout.WALKED
    file.write_text(content)
    note_walk(storage, Walk(()))  # knows of no folder
    assert file.read_text() == content
    with pytest.raises(
        StoreDamaged, match=r"store/\.qvsplit/walked\.json is damaged; run `qvsplit extract` on your folders"
    ):
        walks(storage)
    note_walk(storage, Walk(("/b",)))
    assert walks(storage) == [Walk(("/b",))]


def test_what_is_no_file_is_damage_as_well(storage):
    note_walk(storage, Walk(("/a",)))
    file = storage.folder / layout.WALKED
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(StoreDamaged):
        walks(storage)
    note_walk(storage, Walk(("/b",)))
    assert walks(storage) == [Walk(("/b",))]


def test_of_a_damaged_list_nothing_is_left_where_something_is_to_be_forgotten(storage):
    note_walk(storage, Walk(("/b/secret", "/c")))
    file = storage.folder / layout.WALKED
    file.write_text(file.read_text()[:-3])
    forget_walked(storage, ["/b/secret"])
    assert "secret" not in file.read_text()
    with pytest.raises(StoreDamaged):  # not as if no folder had been walked
        walks(storage)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_list_that_cannot_be_read_is_not_begun_again(storage, monkeypatch, number):
    note_walk(storage, Walk(("/a",)))
    file = storage.folder / layout.WALKED
    before = file.read_bytes()

    def fails(self, name):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "open", fails)
        for touch in (
            lambda: walks(storage),
            lambda: note_walk(storage, Walk(("/b",))),
            lambda: forget_walked(storage, ["/a"]),
        ):
            with pytest.raises(DiskError, match=r"walked\.json cannot be read"):
                touch()
    assert file.read_bytes() == before
