"""`--progress`: how far a run is, of every command that takes long."""

from __future__ import annotations

import json

import pytest

from tests.support.forked import start_on_terminal
from tests.support.terminal import on_terminal

PARTS = ["libraries", "config and processor", "tensors"]


@pytest.fixture
def phases(run_cli, monkeypatch):
    """Run a command with --progress json; give the phases that it told of, and how far each came."""
    monkeypatch.setattr("qvsplit.output.progress.JSON_SECONDS", 0.0)  # so that no part is too short to be told of

    def run(*words: object, code: int = 0) -> dict[str, tuple[int, int | None]]:
        ended, _, said = run_cli(*words, "--progress", "json")
        assert ended == code, said
        told = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        assert {one["type"] for one in told} == {"progress"}
        return {one["phase"]: (one["done"], one["total"]) for one in told}

    return run


def test_every_long_command_says_how_far_it_is(phases, four_photos, checkpoint, tmp_path):
    store = tmp_path / "e"
    model = ("--model", checkpoint)
    assert phases("extract", four_photos, "--out", store, *model)["images"] == (4, 4)
    table = tmp_path / "answers.parquet"
    ask = ("ask", "What is it?", "Where?", "--embeds", store, "--out", table, "--max-new-tokens", 2, *model)
    told = phases(*ask)
    assert told["answers"] == (8, 8)
    assert "loading model" in told
    assert phases(*ask) == {"answers": (8, 8)}  # all of them known: no model
    told = phases("verify", store, "--sample", 2, *model)
    assert told["images"] == (2, 2)
    assert told["shards"] == (1, 1)
    assert "loading model" in told


def test_compact_says_how_far_it_is(phases, run_cli, four_photos, checkpoint, tmp_path):
    store = tmp_path / "e"
    for _ in range(4):
        assert run_cli("extract", four_photos, "--out", store, "--model", checkpoint, "--limit", 1)[0] == 0
    assert phases("compact", store) == {"shards rewritten": (4, 4)}


def test_a_short_run_says_nothing_of_it(run_cli, four_photos, checkpoint, tmp_path):
    """From cron, which mails every line."""
    words = ("extract", four_photos, "--out", tmp_path / "e", "--model", checkpoint)
    for more in ((), ("--progress", "plain")):
        code, _, said = run_cli(*words, *more)
        assert code == 0
        assert not [line for line in said.splitlines() if not line.startswith("qvsplit: ")]


def test_quiet_is_no_progress(run_cli, four_photos, checkpoint, tmp_path):
    words = ("extract", four_photos, "--out", tmp_path / "e", "--model", checkpoint)
    assert run_cli(*words, "--quiet", "--progress", "json") == (0, "", "")


def test_another_mode_is_refused(run_cli, four_photos):
    code, _, said = run_cli("extract", four_photos, "--progress", "loud")
    assert code == 2
    assert "--progress" in said


def test_the_parts_of_loading_are_on_the_terminal(four_photos, checkpoint, tmp_path):
    model = ["--model", str(checkpoint)]
    words = ["extract", str(four_photos), "--out", str(tmp_path / "e"), *model]
    shown = on_terminal(words, NO_COLOR="", TERM="xterm")
    assert "loading model: libraries" in shown
    assert shown.count("images") > 1  # before, and behind it
    words = ["ask", "What is it?", "--embeds", str(tmp_path / "e"), *model]
    shown = on_terminal(words, start=start_on_terminal, NO_COLOR="", TERM="xterm")
    assert "loading model: " in shown
    assert "answers" not in shown  # which are on the terminal themselves


def test_the_parts_of_loading_in_their_order(four_photos, checkpoint, tmp_path):
    from qvsplit.ask import AskOptions, load_session
    from qvsplit.extract import extract_files
    from qvsplit.pipeline.options import ExtractOptions
    from qvsplit.pipeline.summary import ExtractCallbacks

    heard: list[str] = []

    def on_load(part: str, done: int, total: int) -> None:
        if part not in heard[-1:]:
            heard.append(part)

    options = ExtractOptions(model=str(checkpoint))
    extract_files(four_photos, out=tmp_path / "e", options=options, callbacks=ExtractCallbacks(on_load=on_load))
    assert heard == [*PARTS, "laying out", "ready"]
    heard.clear()
    load_session(tmp_path / "e", AskOptions(model=str(checkpoint)), on_load=on_load)
    assert heard == [*PARTS, "ready"]  # a language model is laid out tensor by tensor
