"""A gate over a store fails closed for what is not in the store: images that nobody has extracted, or that have changed."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from qvsplit.pipeline.freshness import freshness, outdated
from qvsplit.store import layout, opening
from qvsplit.store.opening import open_store
from tests.support.nasty_clips import sound_clips
from tests.support.processes import as_nobody

pytestmark = pytest.mark.usefixtures("models_stay_loaded")

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
MAY_HAVE_CHANGED = "qvsplit: 1 item may have changed on disk since its extraction; its answers may be old"


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


@pytest.fixture
def open_album(run_cli, some_photos, checkpoint):
    """A folder in one that everybody may enter: it, the keys and the rows of its store, and the store."""
    with tempfile.TemporaryDirectory() as folder:
        photos, store = Path(folder) / "above" / "photos", Path(folder) / "store"
        (photos / "deep").mkdir(parents=True)
        shutil.copyfile(some_photos / "coins.png", photos / "a.png")
        shutil.copyfile(some_photos / "coins.png", photos / "deep" / "b.png")
        run_cli("extract", photos, "--model", checkpoint, "--out", store, "--quiet")
        Path(folder).chmod(0o755)
        with open_store(store) as opened:
            rows = opened.rows
        yield photos, {row.key for row in rows}, rows, store


def found_in(known, rows, store):
    """What is unreadable, what is not found, and what of the rows is not known to be as it was."""
    found = freshness(known, [str(store)])
    reasons = {row.path: row.error for row in outdated(rows, found.unreadable, by_content=True)}
    return found.unreadable, found.not_found, reasons


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
    assert MAY_HAVE_CHANGED in said
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


def test_a_folder_that_is_there_and_empty_is_noted_as_one_that_is_not_there(album):
    """As the place of a disk is that is not mounted."""
    photos, _, ask = album
    photos.rename(photos.with_name("elsewhere"))
    photos.mkdir()
    code, verdicts, said = ask("--fail-on", "block")
    assert (code, {verdict for verdict, _ in verdicts.values()}) == (0, {"pass"})
    assert said.count(f"{photos} does not exist on this machine, or holds no images any more; what is") == 1


def test_an_empty_folder_of_which_the_store_has_nothing_is_not_noted(album, tmp_path):
    photos, extract, ask = album
    (tmp_path / "later").mkdir()
    extract(photos, tmp_path / "later")
    assert "later" not in ask()[2]


def test_folders_of_one_run_with_a_link_between_them_are_walked_together(album, tmp_path):
    photos, extract, ask = album
    (tmp_path / "other").mkdir()
    shutil.copyfile(photos / "coins.png", tmp_path / "other" / "behind.png")
    (photos / "link").symlink_to(tmp_path / "other")
    extract(photos, tmp_path / "other")
    code, verdicts, _ = ask("--fail-on", "block")
    assert (code, verdicts["behind.png"]) == (0, ("pass", ""))
    shutil.copyfile(photos / "coins.png", tmp_path / "other" / "late.png")
    code, verdicts, _ = ask("--fail-on", "block")
    assert (code, verdicts["late.png"], verdicts["behind.png"]) == (8, ("error", NEW), ("pass", ""))


def test_a_damaged_list_of_folders_is_no_gate_that_passes(album, tmp_path):
    photos, extract, ask = album
    file = tmp_path / "store" / layout.WALKED
    file.write_text(file.read_text()[:-2])
    shutil.copyfile(photos / "coins.png", photos / "late.png")
    code, _, said = ask("--fail-on", "block")
    assert (code, said) == (6, f"qvsplit: {file} is damaged; run `qvsplit extract` on your folders again\n")
    extract()
    assert ask("--fail-on", "block")[0] == 0


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


def test_a_changed_file_that_was_named_by_itself_is_an_error(run_cli, some_photos, checkpoint, tmp_path):
    """No walked folder has it: neither where there is none, nor where a walk would leave it out."""
    (tmp_path / "checks.toml").write_text(CHECKS)
    shutil.copyfile(some_photos / "coins.png", some_photos / ".hidden.png")
    for number, paths in enumerate([[some_photos / "coins.png"], [some_photos, some_photos / ".hidden.png"]]):
        store = tmp_path / str(number)
        run_cli("extract", *paths, "--model", checkpoint, "--out", store, "--quiet")
        words = ("ask", "--embeds", store, "--checks", tmp_path / "checks.toml", "--fail-on", "block")
        assert run_cli(*words)[0] == 0
        kept = paths[-1].read_bytes()
        shutil.copyfile(some_photos / "coffee.png", paths[-1])
        code, out, _ = run_cli(*words)
        assert (code, out.count(CHANGED), out.count("error")) == (8, 1, 1)
        assert run_cli(*words[:2], store / "shard-000001.parquet", *words[3:])[0] == 8  # also where shards are given
        paths[-1].write_bytes(kept)


def test_a_store_that_does_not_say_which_folders_it_has_is_noted(album, tmp_path):
    photos, extract, ask = album
    (tmp_path / "store" / layout.WALKED).unlink()
    shutil.copyfile(photos / "coins.png", photos / "late.png")
    code, verdicts, said = ask("--fail-on", "block")
    assert (code, "late.png" in verdicts) == (0, False)
    assert f"{tmp_path / 'store'}: it is not known which folders this store is kept up to date with; files that" in said
    extract()
    assert "it is not known" not in ask("--fail-on", "block")[2]


def test_a_folder_that_cannot_be_listed_is_an_error_to_the_gate(album):
    """Its items may have changed, and what is new in it is not known."""
    photos, extract, ask = album
    for name in ("full", "void"):
        (photos / name).mkdir()
    shutil.copyfile(photos / "coins.png", photos / "full" / "inside.png")
    extract()
    for name in ("full", "void"):
        (photos / name / ".qvsplitignore").write_bytes(b"\xff\xfe[\n")
    code, verdicts, said = ask("--fail-on", "block")
    errors = {name: why for name, (verdict, why) in verdicts.items() if verdict == "error"}
    assert (code, set(errors)) == (8, {"inside.png", "void"})
    assert "its folder cannot be read (its .qvsplitignore: " in errors["inside.png"]
    assert errors["void"].startswith("is a folder that cannot be read (its .qvsplitignore: ")
    assert said.count(" cannot be read (its .qvsplitignore: ") == 4  # a note and a line of failure for each
    assert ask("--fail-on", "block", "--image", "coins.png")[0] == 0  # it is another's
    assert ask("--fail-on", "block", "--image", "*.png")[0] == 8
    code, verdicts, said = ask()
    assert (code, {verdict for verdict, _ in verdicts.values()}) == (0, {"pass"})
    assert said.count(" cannot be read (its .qvsplitignore: ") == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_without_rights_is_an_error_to_the_gate_and_not_gone(open_album):
    """As an ordinary user meets it, be it the whole folder or one above it."""
    photos, known, rows, store = open_album
    for closed in (photos / "deep", photos, photos.parent):
        before = closed.stat().st_mode
        closed.chmod(0)
        unreadable, not_found, reasons = as_nobody(lambda: found_in(known, rows, store))
        closed.chmod(before)
        assert (unreadable, not_found) == ({str(max(closed, photos)): "Permission denied"}, [])
        assert reasons["deep/b.png"].endswith("its folder cannot be read (Permission denied)")
        assert ("a.png" in reasons) == (closed != photos / "deep")


def test_one_part_of_a_changed_video_is_not_judged_by_its_old_features(run_cli, tmp_path):
    (tmp_path / "checks.toml").write_text(CHECKS)
    film, store = tmp_path / "films" / "film.mp4", tmp_path / "store"
    film.parent.mkdir()
    film.write_bytes(sound_clips()["h264.mp4"])
    run_cli("extract", film.parent, "--model", "demo", "--out", store, "--clip-seconds", 1, "--quiet")
    words = ("ask", "--embeds", store, "--checks", tmp_path / "checks.toml", "--fail-on", "block", "--image")
    for name in ("film.mp4#0", "*.mp4#[0-9]"):
        assert run_cli(*words, name)[0] == 0
    film.write_bytes(film.read_bytes() + b"\0")
    for name in ("film.mp4#0", "*.mp4#[0-9]"):
        code, out, _ = run_cli(*words, name)
        assert (code, out.count(CHANGED), "pass" in out) == (8, 1, False)


def test_a_changed_reference_makes_every_comparison_an_error_to_the_gate(album):
    photos, _, ask = album
    words = ("--compare", "coins.png", "--image", "c*.png")
    assert ask("--fail-on", "block", *words)[0] == 0
    shutil.copyfile(photos / "coffee.png", photos / "coins.png")
    why = f"has not been compared: the reference {CHANGED}"
    code, verdicts, _ = ask("--fail-on", "block", *words[:2], "--image", "coffee.png")
    assert (code, verdicts) == (8, {"coffee.png": ("error", why)})
    code, verdicts, _ = ask("--fail-on", "block", *words)
    assert (code, verdicts["coins.png"], verdicts["coffee.png"]) == (8, ("error", CHANGED), ("error", why))
    code, verdicts, said = ask(*words)
    assert (code, {verdict for verdict, _ in verdicts.values()}) == (0, {"pass"})
    assert MAY_HAVE_CHANGED in said


def test_a_glob_of_files_that_are_not_extracted_is_no_mistake(album):
    photos, _, ask = album
    shutil.copyfile(photos / "coins.png", photos / "new.png")
    code, verdicts, _ = ask("--fail-on", "block", "--image", "new*")
    assert (code, verdicts) == (8, {"new.png": ("error", NEW)})
    code, _, said = ask("--fail-on", "block", "--image", "old*")
    assert code == 2
    assert "--image old* matches none" in said


def test_what_one_of_two_stores_has_is_not_missing_in_the_other(run_cli, some_photos, checkpoint, tmp_path):
    """Nor has it changed, if the row that is asked about is the one of its present bytes."""
    (tmp_path / "checks.toml").write_text(CHECKS)
    (some_photos / "sub").mkdir()
    old, now = tmp_path / "old", tmp_path / "now"
    extract = ("extract", "--model", checkpoint, "--quiet", "--out")
    run_cli(*extract, old, some_photos)
    run_cli(*extract, now, some_photos)
    shutil.copyfile(some_photos / "coffee.png", some_photos / "coins.png")
    shutil.copyfile(some_photos / "coffee.png", some_photos / "sub" / "late.png")
    run_cli(*extract, now, some_photos / "sub")  # stored under `some_photos`
    run_cli(*extract, now, some_photos)
    words = ("ask", "--checks", tmp_path / "checks.toml", "--fail-on", "block", "--embeds")
    assert run_cli(*words, old)[0] == 8
    for stores in ([old, "--embeds", now], [now, "--embeds", old]):
        code, out, _ = run_cli(*words, *stores)
        assert (code, "error" in out) == (0, False), out


def test_a_store_is_opened_once_and_hashes_for_a_gate_alone(album, monkeypatch):
    photos, _, ask = album
    os.utime(photos / "coins.png", (0, 0))
    opened, hashed = [], []
    folder, digest = opening._open_folder, hashlib.file_digest
    monkeypatch.setattr(opening, "_open_folder", lambda *words: opened.append(1) or folder(*words))
    monkeypatch.setattr(hashlib, "file_digest", lambda *words: hashed.append(1) or digest(*words))
    said = ask()[2]
    assert MAY_HAVE_CHANGED in said
    assert (len(opened), hashed) == (1, [])
    assert ask("--fail-on", "block")[0] == 0
    assert hashed


def test_where_items_are_named_one_by_one_no_folder_is_listed(album, monkeypatch):
    """A gate over one image of a million must not read the names of all."""
    photos, _, ask = album
    listed = []
    monkeypatch.setattr("qvsplit.pipeline.freshness.walks", lambda storage: listed.append(storage))
    shutil.copyfile(photos / "coffee.png", photos / "coins.png")
    code, verdicts, _ = ask("--fail-on", "block", "--image", "rocket.jpg")
    assert (code, set(verdicts)) == (0, {"rocket.jpg"})
    assert listed == []
    ask("--fail-on", "block", "--image", "r*.jpg")
    assert len(listed) == 1
