"""Generations: no two runs have the same, and the highest of an item is current."""

from __future__ import annotations

import shutil
import threading

import pytest

from qvsplit.errors import StoreInUse
from qvsplit.store import layout
from qvsplit.store.generation import claim_generation
from qvsplit.store.opening import read_store
from qvsplit.store.storage import LocalStorage
from tests.support import rows
from tests.support.memory_storage import MemoryStorage


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path):
    return LocalStorage(tmp_path / "store") if request.param == "local" else MemoryStorage()


def test_each_claim_is_above_all_others_and_above_the_rows(storage):
    assert [claim_generation(storage, 0) for _ in range(3)] == [1, 2, 3]
    assert claim_generation(storage, 10) == 11
    assert claim_generation(storage, 5) == 12
    assert len(storage.list(layout.GENERATIONS)) == 1  # the rest is of no use


def test_foreign_files_there_are_passed_over(storage):
    storage.put_if_absent(f"{layout.GENERATIONS}/notes.txt", b"")
    assert claim_generation(storage, 0) == 1
    assert [file.name for file in storage.list(layout.GENERATIONS)] == ["000000000001", "notes.txt"]


def test_two_claimants_never_get_the_same_number(tmp_path):
    claimed, errors = [], []

    def claim():
        storage = LocalStorage(tmp_path / "store")
        try:
            for _ in range(15):
                claimed.append(claim_generation(storage, 0))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(claimed) == len(set(claimed)) == 60


def test_a_number_that_was_deleted_in_the_meantime_is_not_given_again():
    """One lists, is paused, and then tries a number that others have claimed, used and cleared away."""

    class Paused(MemoryStorage):
        paused = True

        def list(self, folder=""):
            files = super().list(folder)
            if self.paused and folder == layout.GENERATIONS:
                self.paused = False
                others.extend(claim_generation(self, 4) for _ in range(3))
            return files

    others: list[int] = []
    assert claim_generation(Paused(), 4) not in others
    assert others == [5, 6, 7]


def test_who_never_gets_one_gives_up():
    class Crowded(MemoryStorage):
        def put_if_absent(self, name, content):
            return False

    with pytest.raises(StoreInUse, match="written by others"):
        claim_generation(Crowded(), 0)


def test_the_rows_remember_after_everything_beside_the_shards_was_deleted(tmp_path):
    storage = rows.write_store(tmp_path, [rows.item("a.png", generation=41)])
    assert claim_generation(storage, read_store(storage).generation) == 42
    shutil.rmtree(tmp_path / layout.OWN_FOLDER)
    assert claim_generation(storage, read_store(storage).generation) == 42


def test_a_paused_writer_cannot_hide_what_was_written_meanwhile(storage):
    """It claimed its generation first, and writes last."""
    paused = claim_generation(storage, 0)
    other = claim_generation(storage, 0)
    rows.write_shard(storage, "shard-000001.parquet", [rows.item("a.png", generation=other, sha256=rows.sha("new"))])
    rows.write_shard(storage, "shard-000002.parquet", [rows.item("a.png", generation=paused, sha256=rows.sha("old"))])
    assert read_store(storage).current("/photos", "a.png").sha256 == rows.sha("new")
