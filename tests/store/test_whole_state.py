"""Readers beside a writer: whatever is written, compacted or purged meanwhile, each sees one whole state."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qvsplit.errors import StoreDamaged
from qvsplit.store import layout
from qvsplit.store.compact import compact
from qvsplit.store.opening import open_store, read_store
from qvsplit.store.storage import LocalStorage
from tests.support import rows

ITEMS, RUNS = 12, 24


def content(number: int, run: int) -> str:
    """The content of an item after a run: every third item keeps its own."""
    return rows.sha(f"{number} of {run}" if number % 3 else f"{number}")


def one_run(storage: LocalStorage, run: int) -> None:
    """Every item anew, in one shard: a state in which they are not of one generation is none."""
    pairs = [rows.item(f"{one:03d}.png", 2, generation=run, sha256=content(one, run)) for one in range(ITEMS)]
    pairs.append((rows.deleted(f"gone{run}.png", generation=run), None))
    rows.write_shard(storage, layout.shard_name(run * 10), pairs)


WRITER = """
import sys
from pathlib import Path
from qvsplit.store.catalogue_file import catalogue_of
from qvsplit.store.shards import shard_files
from qvsplit.store.compact import compact, purge
from qvsplit.store.rebuild import begin, put_in_place
from qvsplit.store.storage import LocalStorage
from tests.store.test_whole_state import RUNS, one_run
storage = LocalStorage(Path(sys.argv[1]))
for run in range(2, RUNS + 1):
    with storage.lock(wait=True) as lock:
        one_run(storage, run)
        if run % 2:
            catalogue_of(storage, shard_files(storage)).close()
        if run % 3 == 0:
            compact(storage, lock)
        if run % 7 == 0:
            purge(storage, [f"gone{run}.png"], lock)
"""
READER = """
import json, sys
from qvsplit.errors import StoreDamaged
from qvsplit.store.opening import open_store
from tests.store.test_whole_state import check
states = []
while not (states and states[-1] == int(sys.argv[2])):
    with open_store(sys.argv[1]) as store:
        try:
            states.append(check(store))
        except StoreDamaged as error:  # features of a content that is superseded meanwhile, and was compacted away
            assert "is no longer the store that it was" in str(error), error
print(json.dumps(states))
"""


def check(store) -> int:
    """Give the generation of the state; AssertionError where it is not whole."""
    found = list(store)
    assert [row.path for row in found] == [f"{one:03d}.png" for one in range(ITEMS)], [row.path for row in found]
    (generation,) = {row.generation for row in found}
    for number, row in enumerate(found):
        assert row.sha256 == content(number, generation)
        expected = rows.raws(rows.item(row.path, 2, sha256=row.sha256)[1])
        assert rows.raws(store.features(row)) == expected
    return generation


@pytest.fixture
def storage(tmp_path) -> LocalStorage:
    storage = LocalStorage(tmp_path / "embeds")
    with storage.lock():
        one_run(storage, 1)
    return storage


def start(code: str, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip


def test_readers_beside_a_writer_see_one_whole_state(storage):
    readers = [start(READER, storage.folder, RUNS) for _ in range(2)]
    writer = start(WRITER, storage.folder)
    _, said = writer.communicate(timeout=120)
    assert writer.returncode == 0, said
    for reader in readers:
        printed, said = reader.communicate(timeout=120)
        assert reader.returncode == 0, said
        states = json.loads(printed)
        assert states == sorted(states) and states[-1] == RUNS and len(set(states)) > 2
    assert check(read_store(storage)) == check(open_store(storage.folder)) == RUNS
    assert storage.list(layout.STAGING) == []


def test_a_store_that_was_opened_stays_the_state_that_it_was_while_others_compact(storage):
    before = open_store(storage.folder)
    for run in (2, 3):
        one_run(storage, run)
    kept = [row for row in before if int(row.path[:3]) % 3 == 0]
    with storage.lock() as lock:
        compact(storage, lock)
    assert layout.shard_name(10) not in os.listdir(storage.folder)
    assert {row.generation for row in before} == {1}
    for row in kept:  # their content is still there, in another shard
        assert rows.raws(before.features(row)) == rows.raws(rows.item(row.path, 2, sha256=row.sha256)[1])
    lost = next(row for row in before if row not in kept)
    with pytest.raises(StoreDamaged, match="is no longer the store that it was, and the features of 001.png are not"):
        before.features(lost)


def test_a_read_only_mount_is_read_as_any_other(storage, tmp_path):
    one_run(storage, 2)
    open_store(storage.folder).close()
    one_run(storage, 3)  # the catalogue does not know of it
    place = tmp_path / "mounted"
    place.mkdir()
    for words in (["--bind", storage.folder, place], ["-o", "remount,ro,bind", place]):
        if subprocess.run(["mount", *words], capture_output=True, check=False).returncode:
            pytest.skip("nothing can be mounted here")
    try:
        for _ in range(2):
            with open_store(place) as store:
                assert check(store) == 3
        shutil.copytree(place, tmp_path / "copy")
    finally:
        subprocess.run(["umount", place], check=True)
    assert check(open_store(tmp_path / "copy")) == 3
