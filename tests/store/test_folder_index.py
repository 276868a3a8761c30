"""The cache of folders in which nothing is to be done: it counts only for the very shards it was made from."""

from __future__ import annotations

import hashlib
import json

import pytest

from qvsplit.store import layout
from qvsplit.store.folder_index import FolderIndex, FolderTally, read_index, write_index
from qvsplit.store.shards import shards_in
from tests.support import rows
from tests.support.memory_storage import MemoryStorage

INDEX = FolderIndex(
    config=rows.config(),
    provenance=rows.PROVENANCE,
    folders={("/photos", ""): FolderTally("digest", 2, 1, 0), ("/photos", "a//xff"): FolderTally("", 0, 0, 3)},
    roots=frozenset({"/photos", "/other//xff"}),
    cures={"readers": ["heif"], "timeout": 60},
)


@pytest.fixture
def storage():
    storage = rows.write_store(MemoryStorage(), [rows.item("a.png")], [rows.item("b.png")])
    write_index(storage, shards_in(storage), INDEX)
    return storage


def read(storage) -> FolderIndex | None:
    return read_index(storage, shards_in(storage))


def test_it_comes_back(storage):
    assert read(storage) == INDEX
    assert INDEX.roots_on_disk == {"/photos", "/other\udcff"}


def test_it_does_not_count_for_other_shards(storage):
    other = rows.write_shard(MemoryStorage(), "shard-000001.parquet", [rows.item("x.png")])
    for change in (
        lambda: storage.delete("shard-000002.parquet"),
        lambda: rows.write_shard(storage, "shard-000003.parquet", []),
        lambda: storage.files.update({"shard-000001.parquet": other.storage.files[other.name]}),
        lambda: storage.files.update({"shard-000001.parquet": b"no shard"}),
    ):
        before = dict(storage.files)
        change()
        assert read(storage) is None
        storage.files = before
        assert read(storage) == INDEX


@pytest.mark.parametrize(
    "change",
    [lambda content: content.update(version=1), lambda content: content.pop("folders"),
     lambda content: content.update(folders=[]), lambda content: content.update(roots=7),
     lambda content: content.update(cures=7), lambda content: content["folders"]["/photos"].update(x=[1]),
     lambda content: content["config"].update(kernels="quantum"), lambda content: content["config"].pop("family"),
     lambda content: "[" * 100_000, lambda content: "[]", lambda content: ""],
)  # fmt: skip
def test_nonsense_in_it_is_passed_over(storage, change):
    content = json.loads(storage.files[layout.INDEX].partition(b"\n")[2])
    changed = change(content)
    payload = (changed if isinstance(changed, str) else json.dumps(content)).encode()
    storage.files[layout.INDEX] = hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload
    assert read(storage) is None


def test_a_file_that_was_cut_or_changed_is_passed_over(storage):
    data = storage.files[layout.INDEX]
    for broken in (data[:-1], data[:40], b"", data.replace(b"digest", b"figest")):
        storage.files[layout.INDEX] = broken
        assert read(storage) is None
    del storage.files[layout.INDEX]
    assert read(storage) is None


def test_no_index_is_written_for_shards_that_are_not_sound(storage):
    storage.delete(layout.INDEX)
    storage.files["shard-000001.parquet"] = b"no shard"
    write_index(storage, shards_in(storage), INDEX)
    assert layout.INDEX not in storage.files
