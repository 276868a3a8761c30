"""`qvsplit extract`: what it says, and where."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from qvsplit.cli import app
from qvsplit.errors import ConfigError
from qvsplit.pipeline.summary import Summary
from qvsplit.sources.videos import is_transport_stream
from qvsplit.store.opening import open_store
from tests.support.adapters import make_adapter
from tests.support.extracting import PHOTOS
from tests.support.forked import start_on_terminal
from tests.support.nasty_clips import damaged, hostile, sound_clips
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
    assert run_cli(*words, "--dry-run")[1].startswith("0 of 5 items would be read, 4 are known and unchanged, 1 failed")


def test_a_dry_run_says_how_many(run_cli, four_photos, checkpoint, tmp_path):
    code, out, _ = run_cli("extract", four_photos, "--model", checkpoint, "--out", tmp_path / "e", "--dry-run")
    assert code == 0
    assert out.startswith("4 of 4 items would be read, 0 are known and unchanged\nat most 969 tokens, about ")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("name", "options", "exit_code", "said"),
    [
        ("llava", ("--kernels", "fused"), 2, "there are no fused kernels for llava models: leave --kernels out"),
        (
            "llava",
            ("--max-pixels", "9999"),
            2,
            "the processor of llava models resizes to fixed sizes: leave --min-pixels",
        ),
        ("qwen3_vl", ("--max-pixels", "9"), 2, "--max-pixels must be at least 1024 (one token)"),
        ("qwen2_vl", ("--max-pixels", "9"), 2, "--max-pixels must be at least 784 (one token)"),
        ("ovis2", (), 3, "Ovis2ForConditionalGeneration models cannot be split: its get_image_features gives"),
    ],
)
def test_what_a_family_cannot_is_one_line_of_a_run_and_of_a_dry_run(
    run_cli, four_photos, family_checkpoint, tmp_path, name, options, exit_code, said
):
    words = ("extract", four_photos, "--model", family_checkpoint(name), "--out", tmp_path / "e", *options)
    for how in ((), ("--dry-run",)):
        code, out, line = run_cli(*words, *how)
        assert (code, out, line.count("\n")) == (exit_code, "", 1)
        assert line.startswith(f"qvsplit: {said}")
        assert not (tmp_path / "e").exists()


def test_a_dry_run_looks_at_the_adapter(run_cli, four_photos, small_store, checkpoint, tmp_path):
    adapter = make_adapter(checkpoint, tmp_path / "adapter", target_modules=["q_proj"])
    new = ["-o", tmp_path / "new", "-m", checkpoint]
    for store in (new, ["-o", small_store, PHOTOS["rocket.jpg"]]):
        code, out, err = run_cli("extract", four_photos, *store, "--dry-run", "--adapter", adapter)
        assert code == 0 and "would be read" in out and f"{adapter} changes nothing here: it has nothing for" in err
        code, out, err = run_cli("extract", four_photos, *store, "--dry-run", "--adapter", tmp_path / "none")
        assert (code, out) == (3, "") and f"no adapter folder at {tmp_path / 'none'}" in err
    assert not (tmp_path / "new").exists()


def test_the_bar_is_on_a_terminal(four_photos, checkpoint, tmp_path):
    words = ["extract", str(four_photos), "--model", str(checkpoint), "--out", str(tmp_path / "e")]
    shown = on_terminal(words, start=start_on_terminal, NO_COLOR="", TERM="xterm")
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
    assert json.loads(out) == {"type": "error", "error": said.removeprefix("qvsplit: ").strip(), "exit_code": 2}


def test_the_time_that_a_run_may_take(run_cli, four_photos, tmp_path):
    code, _, said = run_cli("extract", four_photos, "--out", tmp_path / "e", "--max-runtime", "soon")
    assert (code, said) == (2, "qvsplit: --max-runtime soon: give a time such as 90m, 2h30m or 45s\n")


@pytest.fixture
def ending(monkeypatch):
    """Have extract_files end by this exception, after it was heard what it did."""

    def end(error, *, heard=True):
        def extract_files(paths, *, out, options, callbacks):
            if heard:
                callbacks.on_end(Summary(found=3, to_read=3, encoded=2, new=2, remaining=1, interrupted=True))
            raise error

        monkeypatch.setattr("qvsplit.extract.extract_files", extract_files)

    return end


def test_what_an_interrupted_run_did_is_printed_once(run_cli, ending):
    ending(KeyboardInterrupt())
    code, _, said = run_cli("extract", "photos")
    assert (code, said.count("2 new")) == (130, 1)
    code, out, _ = run_cli("extract", "photos", "--json")
    assert (code, json.loads(out)["new"]) == (130, 2)
    ending(KeyboardInterrupt(), heard=False)
    code, out, _ = run_cli("extract", "photos", "--json")
    assert (code, out) == (130, "")


def test_an_error_is_one_object_with_what_was_done(run_cli, ending):
    ending(ConfigError("leave `model` out, or make this one again with `rebuild=True`"))
    code, out, said = run_cli("extract", "photos", "--json")
    message = "leave --model out, or make this one again with --rebuild"
    assert (code, said) == (4, f"qvsplit: {message}\n")
    printed = json.loads(out)
    assert (printed["new"], printed["error"], printed["exit_code"]) == (2, message, 4)
    ending(ConfigError("no"), heard=False)
    assert json.loads(run_cli("extract", "photos", "--json")[1]) == {"type": "error", "error": "no", "exit_code": 4}


def test_notes_and_reasons_name_flags(run_cli, monkeypatch):
    def extract_files(paths, *, out, options, callbacks):
        callbacks.on_note("with `dtype=bfloat16` it is faster")
        callbacks.on_failure("`model`.jpg", "took longer than `item_timeout`")
        return Summary()

    monkeypatch.setattr("qvsplit.extract.extract_files", extract_files)
    _, _, said = run_cli("extract", "photos")
    assert "with --dtype bfloat16 it is faster" in said
    assert "failed: `model`.jpg took longer than --item-timeout" in said  # a path is the path


# ------------------------------------------------------------------------------------------------- clips from anywhere


def test_no_hostile_or_damaged_clip_stops_a_run(tmp_path, capfd):
    """Each is one row with a plain reason, or read; what lies beside them is encoded, and nobody else writes to stderr."""
    folder, out = tmp_path / "mixed", tmp_path / "embeds"
    folder.mkdir()
    clips = hostile()
    for name, clip in clips.items():
        (folder / name).write_bytes(clip.data)
    for name, data in damaged(32, seed=3):
        (folder / name).write_bytes(data)
    for photo in ("coffee.png", "rocket.jpg"):
        shutil.copyfile(PHOTOS[photo], folder / photo)
    (folder / "sound.mp4").write_bytes(sound_clips()["h264.mp4"])
    words = ["extract", folder, "--out", out, "--model", "demo", "--gif", "video", "--item-timeout", 20, "--json"]
    with pytest.raises(SystemExit) as ended:
        app([str(word) for word in (*words, "--num-frames", 4)], prog_name="qvsplit")
    printed, said = capfd.readouterr()
    assert ended.value.code == 1, said
    assert all(line.startswith("qvsplit: failed: ") for line in said.splitlines()), said
    every = open_store(out).rows
    rows = {row.path: row for row in every}
    typescript = {  # for all that a walk can tell
        path.name for path in folder.glob("*.ts") if not is_transport_stream(path.read_bytes()[:4096])
    }
    assert rows.keys() == {path.name for path in folder.iterdir()} - typescript
    assert len(every) == len(rows)  # one each
    wrong = []
    for name, row in rows.items():
        reason = row.error or ""
        clip = clips.get(name)
        if clip is not None and clip.fails is not None and clip.fails != (row.status == "failed"):
            wrong.append((name, row.status, reason))
        if clip is not None and clip.reason not in reason:
            wrong.append((name, reason))
        if row.status == "failed" and (len(reason) > 200 or "Errno" in reason or "\n" in reason or "crash" in reason):
            wrong.append((name, reason))
    assert not wrong
    assert {rows[name].status for name in ("coffee.png", "rocket.jpg", "sound.mp4")} == {"ok"}
    summary = json.loads(printed)
    assert summary["failed"] == sum(row.status == "failed" for row in rows.values())
    assert summary["decoder_memory_bytes"] < 1 << 30
