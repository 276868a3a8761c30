"""What the last runs did."""

from __future__ import annotations

import pytest

from qvsplit.store import history, layout
from qvsplit.store.storage import LocalStorage
from tests.support.memory_storage import MemoryStorage


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path):
    return LocalStorage(tmp_path / "store") if request.param == "local" else MemoryStorage()


def put(storage, data: bytes) -> None:
    with storage.put_whole(layout.HISTORY) as stream:
        stream.write(data)


def test_runs_come_back_the_latest_last_without_what_is_empty(storage):
    assert history.last_runs(storage) == []
    history.add_run(storage, 0.0, {"encoded": 3, "failed": 0, "model": "", "stages": {}, "interrupted": False})
    history.add_run(storage, 86_400.0, {"encoded": 0, "deleted": 1})
    assert history.last_runs(storage) == [
        {"began": "1970-01-01T00:00:00Z", "encoded": 3}, {"began": "1970-01-02T00:00:00Z", "deleted": 1},
    ]  # fmt: skip
    assert history.last_runs(storage, 1) == history.last_runs(storage)[-1:]


def test_it_is_cut_back(storage, monkeypatch):
    monkeypatch.setattr(history, "_KEPT", 5)
    for number in range(1, 9):
        history.add_run(storage, 0.0, {"encoded": number})
    assert [run["encoded"] for run in history.last_runs(storage)] == [4, 5, 6, 7, 8]


def test_a_line_that_is_no_record_is_passed_over(storage):
    put(storage, b'{"encoded": 1}\n\xff\xfe\n[1]\n' + b"[" * 100_000 + b"\n{\n7\n" + b'{"encoded": 2}\n')
    assert [run["encoded"] for run in history.last_runs(storage)] == [1, 2]
    history.add_run(storage, 0.0, {"encoded": 3})
    assert [run["encoded"] for run in history.last_runs(storage)] == [1, 2, 3]


def test_where_it_cannot_be_written_the_run_goes_on(tmp_path):
    (tmp_path / "store").write_text("a file where the store should be")
    history.add_run(LocalStorage(tmp_path / "store"), 0.0, {"encoded": 1})
    assert history.last_runs(LocalStorage(tmp_path / "store")) == []
