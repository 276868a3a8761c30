"""`qvsplit compact` and `qvsplit purge`: what they say and where they write. What they do is tested in tests/store."""

from __future__ import annotations

import json

from qvsplit.store.opening import open_store
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
