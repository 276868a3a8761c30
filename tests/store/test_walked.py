"""Which folders a store is kept up to date with."""

from __future__ import annotations

import pytest

from qvsplit.store import layout
from qvsplit.store.storage import LocalStorage
from qvsplit.store.walked import Walked, forget_walked, note_walked, walked_folders


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path / "store")


def test_the_last_word_on_each_folder_counts(storage):
    assert walked_folders(storage) == []
    note_walked(storage, [Walked("/b"), Walked("/a/\udcff", ("*.gif",), videos=False)])
    note_walked(storage, [Walked("/b", ("x/",))])
    assert walked_folders(storage) == [Walked("/a/\udcff", ("*.gif",), videos=False), Walked("/b", ("x/",))]


def test_only_what_is_new_is_written(storage):
    note_walked(storage, [Walked("/b")])
    file = storage.folder / layout.WALKED
    before = file.stat()
    note_walked(storage, [Walked("/b")])
    forget_walked(storage, ["/c", "/b/sub"])
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_is_forgotten_leaves_no_trace(storage):
    note_walked(storage, [Walked("/b/secret"), Walked("/b/secrets"), Walked("/c")])
    forget_walked(storage, ["/b/secret"])
    assert [one.folder for one in walked_folders(storage)] == ["/b/secrets", "/c"]
    assert '"/b/secret"' not in (storage.folder / layout.WALKED).read_text()


@pytest.mark.parametrize(
    "content", ["", "[]", '{"/a": 1}', '{"/a": {}}', "\x00", '{"/a": {"exclude": 1, "videos": 1}}']
)
def test_a_file_that_is_no_such_list_is_none(storage, content):
    note_walked(storage, [Walked("/a")])
    (storage.folder / layout.WALKED).write_text(content)
    assert walked_folders(storage) == []
    note_walked(storage, [Walked("/b")])
    assert walked_folders(storage) == [Walked("/b")]
