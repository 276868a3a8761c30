"""`qvsplit inspect`: what a store holds."""

from __future__ import annotations

import json

from qvsplit.store.store import open_store


def test_inspect(run_cli, small_store, checkpoint):
    code, out, _ = run_cli("inspect", small_store)
    assert code == 0
    assert "images      4 ok (0 by the features of another image), 0 failed, 0 deleted" in out
    assert str(checkpoint) in out
    description = json.loads(run_cli("inspect", small_store, "--json")[1])
    assert (description["images"], description["config"]["compute_dtype"], description["width"]) == (4, "float32", 128)
    assert description["tokens"] == sum(row.n_tokens for row in open_store(small_store))
    assert description["without_features"] == description["superseded"] == 0


def test_what_failed_and_why(run_cli, postcards):
    _, out, _ = run_cli("inspect", postcards)
    assert "13 ok (1 by the features of another image), 1 failed, 0 deleted" in out
    assert "failed      torn.jpg is a JPEG file that is cut off or damaged" in out
    assert "run         20" in out
    assert "12 encoded, 1 copied, 1 failed in " in out
    description = json.loads(run_cli("inspect", postcards, "--json")[1])
    assert [failure["path"] for failure in description["failures"]] == ["torn.jpg"]


def test_a_single_shard(run_cli, small_store):
    (shard,) = small_store.glob("*.parquet")
    assert run_cli("inspect", shard)[0] == run_cli("inspect", "--embeds", shard)[0] == 0
