"""`qvsplit extract`: what it says, and where."""

from __future__ import annotations

import json
import os

from tests.support.terminal import on_terminal


def test_extract_says_what_it_did(run_cli, some_photos, checkpoint, tmp_path):
    (some_photos / "bad.png").write_text("no image")
    os.utime(some_photos / "bad.png", (1_600_000_000, 1_600_000_000))
    words = ("extract", some_photos, "--model", checkpoint, "--out", tmp_path / "e")
    code, out, said = run_cli(*words)
    assert (code, out) == (1, "")
    assert "qvsplit: failed: bad.png is not an image" in said
    assert "4 new, 1 failed in " in said
    assert "peak memory" in said
    assert "4/4" not in said  # no bar where there is no terminal
    assert "\x1b" not in said
    code, out, said = run_cli(*words, "--retry-failed", "--json")
    assert (code, said) == (0, "")
    summary = json.loads(out)
    assert (summary["unchanged"], summary["failed"], summary["failed_again"]) == (4, 0, 1)
    assert {
        "encoded", "moved", "deleted", "tokens", "bytes", "seconds", "stages", "peak_memory_bytes"
    } <= summary.keys()  # fmt: skip
    assert run_cli(*words, "--quiet") == (0, "", "")
    assert run_cli(*words, "--dry-run")[1].startswith(
        "0 of 5 images would be read, 4 are known and unchanged, 1 failed"
    )


def test_a_dry_run_says_how_many(run_cli, four_photos, checkpoint, tmp_path):
    code, out, _ = run_cli("extract", four_photos, "--model", checkpoint, "--out", tmp_path / "e", "--dry-run")
    assert code == 0
    assert out.startswith("4 of 4 images would be read, 0 are known and unchanged\nat most 969 tokens, about ")
    assert not (tmp_path / "e").exists()


def test_the_bar_is_on_a_terminal(four_photos, checkpoint, tmp_path):
    words = ["extract", str(four_photos), "--model", str(checkpoint), "--out", str(tmp_path / "e")]
    shown = on_terminal(words, NO_COLOR="1", TERM="xterm")
    assert "images" in shown
    assert "4/4" in shown
    assert "4 new" in shown


def test_the_store_has_two_names_and_one_meaning(run_cli, four_photos, store, tmp_path, monkeypatch):
    """`extract PATH` writes to `embeds`; --out and --embeds name another place."""
    monkeypatch.chdir(tmp_path)  # where `store` is `embeds`
    for words in ((), ("--out", store), ("--embeds", store)):
        code, out, _ = run_cli("extract", four_photos, *words, "--json")
        assert (code, json.loads(out)["unchanged"]) == (0, 4)


def test_an_error_is_json_too(run_cli, tmp_path):
    code, out, said = run_cli("extract", tmp_path / "nowhere", "--json")
    assert code == 2
    assert json.loads(out) == {"error": said.removeprefix("qvsplit: ").strip(), "exit_code": 2}


def test_the_time_that_a_run_may_take(run_cli, four_photos, tmp_path):
    code, _, said = run_cli("extract", four_photos, "--out", tmp_path / "e", "--max-runtime", "soon")
    assert (code, said) == (2, "qvsplit: --max-runtime soon: give a time such as 90m, 2h30m or 45s\n")
