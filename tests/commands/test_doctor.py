"""`qvsplit doctor`: the text that a bug report should carry, and an exit code for what would stop an extraction."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qvsplit import doctor
from qvsplit.store import layout
from qvsplit.store.repair import mark_damage
from qvsplit.store.storage import LocalStorage


@pytest.fixture(autouse=True)
def _no_imports(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_ASKED", dict.fromkeys(doctor.NEEDED, "facts = {}"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def own_store(small_store, tmp_path) -> Path:
    return Path(shutil.copytree(small_store, tmp_path / "album"))


def told(run_cli, *words) -> tuple[int, dict]:
    code, out, _ = run_cli("doctor", *words, "--json")
    return code, json.loads(out)


def test_without_a_store(run_cli):
    code, out, err = run_cli("doctor")
    assert (code, err) == (0, "")
    assert any(line.split() == ["imports", "torch", "ok"] for line in out.splitlines())
    assert not any(line.startswith("store") for line in out.splitlines())


def test_a_store_by_default_and_by_name(run_cli, small_store, own_store):
    assert "store" not in told(run_cli)[1]
    code, found = told(run_cli, small_store)
    assert code == 0
    assert (found["type"], found["problems"]) == ("doctor", [])
    assert found["store"]["items"] == {"images ok": 4}
    assert found["store"]["catalogue"] == "up to date"
    assert found["store"]["shards"].startswith("1, ")
    assert found["disk"]["writable"] is True
    own_store.rename("embeds")
    assert told(run_cli)[1]["store"]["items"] == {"images ok": 4}


def test_failed_items_are_counted_without_their_names(run_cli, postcards):
    code, found = told(run_cli, "--embeds", postcards)
    assert code == 0
    assert found["store"]["failed"] == {"is a JPEG file that is cut off or damaged": 1}
    assert "torn" not in json.dumps(found)


def test_a_catalogue_that_is_gone(run_cli, own_store):
    (own_store / layout.CATALOGUE).unlink()
    code, found = told(run_cli, own_store)
    assert code == 0
    assert found["store"]["catalogue"].startswith("none")


def test_marked_damage(run_cli, own_store):
    assert mark_damage(LocalStorage(own_store), "shard-000001.parquet", "page 3")
    code, found = told(run_cli, own_store)
    assert code == 6
    assert found["store"]["damaged"] == ["shard-000001.parquet"]
    assert "shard-000001.parquet" in found["problems"][0]


def test_damage_in_the_features_shows_with_checksums_alone(run_cli, own_store):
    shard = own_store / "shard-000001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, found = told(run_cli, own_store)
    assert (code, found["store"].get("checksums")) == (0, None)
    code, found = told(run_cli, own_store, "--checksums")
    assert code == 6
    assert "shard-000001.parquet" in found["store"]["checksums"][0]


def test_checksums_of_a_sound_store(run_cli, own_store):
    code, found = told(run_cli, own_store, "--checksums")
    assert (code, found["store"]["checksums"]) == (0, "all right")


def test_a_store_that_cannot_be_read(run_cli, own_store):
    (own_store / "shard-000001.parquet").write_bytes(b"PAR1 nothing of the kind")
    (own_store / layout.CATALOGUE).unlink()
    code, found = told(run_cli, own_store)
    assert code == 6
    assert "unknown" in found["store"]
    assert found["versions"]["python"]


def test_a_broken_library_is_exit_code_3(run_cli, monkeypatch):
    monkeypatch.setitem(doctor._ASKED, "torch", "raise OSError('no libtorch')")
    code, out, err = run_cli("doctor")
    assert code == 3
    assert "no libtorch" in out
    assert err.startswith("qvsplit: torch cannot be imported (OSError: no libtorch)")


def test_a_file_is_no_store(run_cli, own_store):
    code, out, _ = run_cli("doctor", own_store / "shard-000001.parquet")
    assert (code, out) == (2, "")
