"""A gate over a store fails closed for what is not in the store: images that nobody has extracted, or that have changed."""

from __future__ import annotations

import os
import shutil

import pytest

CHECKS = """
min_choice_mass = 0

[[check]]
id = "dog"
question = "Is there a dog?"
choices = ["yes", "no"]
flag = "yes"
threshold = 1
level = "block"
"""
NEW = "is not yet extracted; run `qvsplit extract` again"
CHANGED = "has changed on disk since it was extracted; run `qvsplit extract` again"


@pytest.fixture
def album(run_cli, some_photos, checkpoint, tmp_path):
    """A folder with its store, and what `ask --checks` says of it: exit code, verdicts by name, stderr."""
    (tmp_path / "checks.toml").write_text(CHECKS)
    store = tmp_path / "store"

    def extract(*words):
        assert run_cli("extract", *(words or [some_photos]), "--model", checkpoint, "--out", store, "--quiet")[0] == 0

    def ask(*words):
        code, out, said = run_cli("ask", "--embeds", store, "--checks", tmp_path / "checks.toml", *words)
        lines = [line.split("\t") for line in out.splitlines()]
        return code, {os.path.basename(line[1]): (line[6], line[7]) for line in lines if line[0] == "verdict"}, said

    extract()
    return some_photos, extract, ask


def test_nothing_is_stale_behind_an_extraction(album):
    photos, _, ask = album
    code, verdicts, said = ask("--fail-on", "info")
    assert code == 0
    assert set(verdicts) == {path.name for path in photos.iterdir()}
    assert {verdict for verdict, _ in verdicts.values()} == {"pass"}
    assert said == f"qvsplit: pass: {len(verdicts)}\n"


@pytest.mark.parametrize("words", [("--fail-on", "block"), ()])
def test_an_image_that_is_not_extracted_is_an_error(album, words):
    photos, extract, ask = album
    (photos / "new").mkdir()
    shutil.copyfile(photos / "coins.png", photos / "new" / "late.png")
    code, verdicts, _ = ask(*words)
    assert (code, verdicts.pop("late.png")) == (8 if words else 0, ("error", NEW))
    assert {verdict for verdict, _ in verdicts.values()} == {"pass"}
    assert ask("--fail-on", "block", "--allow", "error")[0] == 0
    assert ask("--fail-on", "block", "--image", "c*.png")[0] == 0  # it is not selected
    assert ask("--fail-on", "block", "--image", "*.png")[0] == 8
    extract()
    assert ask("--fail-on", "block")[0] == 0


def test_one_that_has_changed_is_an_error_to_the_gate_alone(album):
    photos, extract, ask = album
    shutil.copyfile(photos / "coffee.png", photos / "coins.png")
    code, verdicts, _ = ask("--fail-on", "block")
    assert (code, verdicts["coins.png"], verdicts["coffee.png"]) == (8, ("error", CHANGED), ("pass", ""))
    code, verdicts, said = ask()
    assert (code, verdicts["coins.png"]) == (0, ("pass", ""))
    assert "qvsplit: 1 item has changed on disk since they were extracted" in said
    extract()
    assert ask("--fail-on", "block")[0] == 0


def test_another_time_alone_is_no_change(album):
    photos, _, ask = album
    os.utime(photos / "coins.png", (0, 0))
    assert ask("--fail-on", "block")[0] == 0


def test_a_folder_that_is_not_on_this_machine_is_noted(album):
    photos, _, ask = album
    photos.rename(photos.with_name("elsewhere"))
    code, verdicts, said = ask("--fail-on", "block")
    assert (code, {verdict for verdict, _ in verdicts.values()}) == (0, {"pass"})
    assert f"{photos} does not exist on this machine" in said


def test_what_the_extraction_leaves_out_is_not_missing(album):
    photos, extract, ask = album
    shutil.copyfile(photos / "coins.png", photos / "raw.png")
    extract(photos, "--exclude", "raw*")
    assert ask("--fail-on", "block")[0] == 0


def test_the_neighbours_of_single_files_are_not_missing(run_cli, some_photos, checkpoint, tmp_path):
    (tmp_path / "checks.toml").write_text(CHECKS)
    run_cli("extract", some_photos / "coins.png", "--model", checkpoint, "--out", tmp_path / "e", "--quiet")
    words = ("ask", "--embeds", tmp_path / "e", "--checks", tmp_path / "checks.toml", "--fail-on", "block", "--quiet")
    assert run_cli(*words)[0] == 0


def test_what_a_run_has_left_for_the_next_is_an_error(run_cli, some_photos, checkpoint, tmp_path):
    (tmp_path / "checks.toml").write_text(CHECKS)
    run_cli("extract", some_photos, "--model", checkpoint, "--out", tmp_path / "e", "--limit", "1", "--quiet")
    words = ("ask", "--embeds", tmp_path / "e", "--checks", tmp_path / "checks.toml", "--fail-on", "block", "--quiet")
    code, out, _ = run_cli(*words)
    assert (code, out.count(NEW)) == (8, len(list(some_photos.iterdir())) - 1)
    assert (
        run_cli(*words[:2], tmp_path / "e" / "shard-000001.parquet", *words[3:])[0] == 0
    )  # nothing says what else there is


def test_a_purged_folder_is_not_missed(run_cli, album, tmp_path):
    photos, extract, ask = album
    (tmp_path / "more").mkdir()
    shutil.copyfile(photos / "coins.png", tmp_path / "more" / "secret.png")
    extract(tmp_path / "more")
    assert run_cli("purge", tmp_path / "more", "--embeds", tmp_path / "store", "--quiet")[0] == 0
    code, verdicts, _ = ask("--fail-on", "block")
    assert code == 0
    assert "secret.png" not in verdicts
