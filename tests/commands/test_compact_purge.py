"""`qvsplit compact` and `qvsplit purge`: what they say and where they write. What they do is tested in tests/store."""

from __future__ import annotations

import json

from qvsplit.errors import size
from qvsplit.store.opening import open_store
from qvsplit.store.storage import LocalStorage
from tests.support.terminal import one_line


def test_compact_says_what_it_did(run_cli, store):
    assert run_cli("compact", store) == (0, "", "")  # nothing to do, and nobody watches
    code, out, _ = run_cli("compact", "--embeds", store, "--json")
    assert (code, json.loads(out)["shards_after"]) == (0, 1)


def test_purge_takes_the_store_as_an_option(run_cli, store, four_photos):
    code, out, said = run_cli("purge", four_photos / "coins.png", "--embeds", store)
    assert (code, out) == (0, "")
    assert said.startswith("qvsplit: 1 item purged; ")
    assert "qvsplit: 1 of them: the file still exists" in said
    assert sorted(row.path for row in open_store(store)) == ["chelsea.png", "coffee.png", "rocket.jpg"]
    code, out, said = run_cli("purge", "coffee.png", "--embeds", store, "--json")
    assert (code, json.loads(out)["purged"], said) == (0, 1, "")


def test_the_store_is_embeds_where_nothing_is_said(run_cli, store, monkeypatch):
    monkeypatch.chdir(store.parent)
    assert run_cli("compact")[0] == 0
    assert run_cli("purge", "coins.png", "--quiet")[0] == 0
    assert len(open_store(store)) == 3


def test_no_store(run_cli, tmp_path):
    for words in (("compact", tmp_path / "nowhere"), ("purge", "a.jpg", "--embeds", tmp_path)):
        code, _, said = run_cli(*words)
        assert (code, "no store at" in one_line(said)) == (2, True)


def every_file(folder) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_dry_run_says_what_would_be_done_and_changes_nothing(run_cli, store, four_photos):
    before = every_file(store)
    with LocalStorage(store).lock():  # and waits for no other run
        assert run_cli("compact", store, "--dry-run") == (
            0, f"nothing to do: 1 shard, {size(sum(file.stat().st_size for file in store.glob('*.parquet')))}\n", "",
        )  # fmt: skip
        code, out, said = run_cli("purge", four_photos / "coins.png", "rocket.jpg", "-e", store, "--dry-run")
    assert (code, said) == (0, "")
    assert out.splitlines()[:3] == [
        f"would purge {four_photos / 'coins.png'}", f"would purge {four_photos / 'rocket.jpg'}",
        "2 items would be purged",
    ]  # fmt: skip
    assert "would rewrite 1 of 1 shard" in out and ": 2 rows kept, 2 dropped, with the features of 2 images" in out
    assert out.splitlines()[-1].startswith("2 of them: the file still exists")
    assert every_file(store) == before

    plan = json.loads(run_cli("purge", "coins.png", "-e", store, "--dry-run", "--json")[1])
    done = json.loads(run_cli("purge", "coins.png", "-e", store, "--json")[1])
    assert [item["path"] for item in plan["items"]] == ["coins.png"]
    assert (plan["type"], plan["rows_dropped"]) == ("preview", done["rows_dropped"])
    plan = json.loads(run_cli("compact", store, "--dry-run", "--json")[1])
    assert (plan["type"], plan["shards_rewritten"]) == ("preview", 0)
    for words in (("compact", store.parent / "nowhere"), ("purge", "b.png", "-e", store.parent / "nowhere")):
        code, _, said = run_cli(*words, "--dry-run")
        assert (code, "no store at" in one_line(said)) == (2, True)
    code, _, said = run_cli("purge", "nothing-there.png", "-e", store, "--dry-run")
    assert (code, "knows no item at nothing-there.png" in one_line(said)) == (2, True)
