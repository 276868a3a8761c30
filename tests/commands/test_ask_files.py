"""`qvsplit ask --image FILE`: what no store has is encoded for the questions of this run; and files for questions."""

from __future__ import annotations

import json
import os
import shutil

import pytest

QUESTION = "What is in the image?"
ENCODED = "qvsplit: 1 file was encoded for these questions alone; `qvsplit extract` keeps what it encodes\n"


@pytest.fixture
def unknown(photos, tmp_path):
    """A photograph that the small store does not have."""
    file = tmp_path / "new.jpg"
    shutil.copyfile(photos / "turned.jpg", file)
    return file


def tokens(out: str) -> dict[str, list[int]]:
    return {line["path"]: line["tokens"] for line in map(json.loads, out.splitlines()) if line["type"] == "answer"}


def files_of(folder):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_file_that_no_store_has_is_answered_as_if_it_were_extracted(
    run_cli, small_store, unknown, checkpoint, tmp_path
):
    before = files_of(small_store)
    words = ("--json", "--max-new-tokens", 8, QUESTION)
    code, out, said = run_cli("ask", "--embeds", small_store, "--image", unknown, "--image", "coins.png", *words)
    assert (code, said) == (0, ENCODED)
    assert files_of(small_store) == before
    run_cli("extract", unknown, "--out", tmp_path / "embeds", "--model", checkpoint)
    new = run_cli("ask", "--embeds", tmp_path / "embeds", *words)[1]
    old = run_cli("ask", "--embeds", small_store, "--image", "coins.png", *words)[1]
    assert tokens(out) == tokens(new) | tokens(old)
    assert set(tokens(out)) == {"new.jpg", "coins.png"}


def test_no_store_is_needed_where_there_is_none_and_all_are_files(run_cli, unknown, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--model", checkpoint, "--max-new-tokens", 4, QUESTION)
    code, out, said = run_cli("ask", "--image", "new.jpg", *words)
    assert (code, said) == (0, ENCODED)
    assert out.strip()
    assert [path.name for path in tmp_path.iterdir()] == ["new.jpg"]
    assert run_cli("ask", "--image", "new.jpg", "--quiet", *words)[2] == ""
    code, _, said = run_cli("ask", "--image", "new.jpg", "--image", "old.jpg", *words)
    assert code == 2
    assert "embeds" in said


@pytest.mark.parametrize("command", ["ask", "chat"])
def test_a_file_over_the_limits_is_named_with_the_option_that_allows_more(run_cli, unknown, checkpoint, command):
    words = ("ask", "--image", unknown, QUESTION) if command == "ask" else ("chat", unknown)
    code, _, said = run_cli(*words, "--model", checkpoint, "--max-image-pixels", 10)
    assert code == 2
    assert "over the limit of 10, as a decompression bomb would; --max-image-pixels allows more" in said


def test_a_store_that_is_named_must_be_there(run_cli, unknown, tmp_path):
    code, _, said = run_cli("ask", "--embeds", tmp_path / "none", "--image", unknown, QUESTION)
    assert code == 2
    assert str(tmp_path / "none") in said


def test_the_stores_own_item_of_that_name_is_meant_first(
    run_cli, small_store, unknown, four_photos, tmp_path, monkeypatch
):
    """Also where another file of that name lies here, and that is said: nothing is encoded."""
    words = ("ask", "--embeds", small_store, "--image", "coins.png", "--json", "--max-new-tokens", 4, QUESTION)
    expected = run_cli(*words)
    unknown.rename(tmp_path / "coins.png")
    monkeypatch.chdir(tmp_path)
    code, out, said = run_cli(*words)
    theirs = four_photos.resolve() / "coins.png"
    means = f"qvsplit: coins.png is the store's {theirs}; write ./coins.png for the file here\n"
    assert (code, said) == (0, means)
    assert tokens(out) == tokens(expected[1])
    assert run_cli(*words, "--quiet")[2] == ""
    assert run_cli(*words[:4], "./coins.png", *words[5:])[2] == ENCODED
    checks = ("--choices", "yes,no")
    assert run_cli(*words[:-1], "--image", theirs, "Is it?", *checks)[2].startswith(means)
    (tmp_path / "c.toml").write_text(
        '[[check]]\nid = "a"\nquestion = "A?"\nchoices = ["yes", "no"]\nflag = "yes"\nmin_choice_mass = 0\n'
    )
    for gate in ([], ["--fail-on", "block"]):
        assert run_cli(*words[:5], "--checks", tmp_path / "c.toml", *gate) == (2, "", means)


def test_a_file_here_with_the_bytes_of_the_item_of_that_name_is_that_item(
    run_cli, small_store, four_photos, tmp_path, monkeypatch
):
    shutil.copyfile(four_photos / "coins.png", tmp_path / "coins.png")
    monkeypatch.chdir(tmp_path)
    words = ("ask", "--embeds", small_store, "--image", "coins.png", "--max-new-tokens", 2, QUESTION)
    assert run_cli(*words)[::2] == (0, "")


@pytest.mark.parametrize("checked", [False, True])
def test_a_file_that_has_changed_since_it_was_extracted_is_asked_about_as_it_is(
    run_cli, four_photos, unknown, checkpoint, tmp_path, checked
):
    folder, out = tmp_path / "kept", tmp_path / "embeds"
    shutil.copytree(four_photos, folder)
    run_cli("extract", folder, "--out", out, "--model", checkpoint)
    old = run_cli("ask", "--embeds", out, "--image", "coins.png", "--json", "--max-new-tokens", 8, QUESTION)[1]
    shutil.copyfile(unknown, folder / "coins.png")
    (tmp_path / "c.toml").write_text(
        '[[check]]\nid = "a"\nquestion = "A?"\nchoices = ["yes", "no"]\nflag = "yes"\nmin_choice_mass = 0\n'
    )
    words = ["--checks", tmp_path / "c.toml", "--fail-on", "block"] if checked else ["--max-new-tokens", 8, QUESTION]
    ask = ("ask", "--embeds", out, "--json", *words)
    code, new, said = run_cli(*ask, "--image", folder / "coins.png")
    assert ENCODED in said
    if checked:
        assert "error" not in {line.get("verdict") for line in map(json.loads, new.splitlines())}
        return
    assert code == 0
    assert tokens(new) != tokens(old)
    fresh = run_cli("ask", "--image", unknown, "--embeds", out, "--json", *words)[1]
    assert tokens(new)["coins.png"] == tokens(fresh)["new.jpg"]
    os.utime(folder / "coffee.png")  # the same bytes at another time
    assert run_cli(*ask, "--image", folder / "coffee.png")[2] == ""


def test_content_that_the_store_has_under_another_name_is_not_encoded(run_cli, small_store, four_photos, tmp_path):
    shutil.copyfile(four_photos / "coins.png", tmp_path / "copy.png")
    words = ("--json", "--max-new-tokens", 6, QUESTION)
    code, out, said = run_cli("ask", "--embeds", small_store, "--image", tmp_path / "copy.png", *words)
    assert (code, said) == (0, "")
    stored = run_cli("ask", "--embeds", small_store, "--image", "coins.png", *words)[1]
    assert tokens(out)["copy.png"] == tokens(stored)["coins.png"]


def test_a_file_that_cannot_be_read_is_named(run_cli, small_store, tmp_path):
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    code, _, said = run_cli("ask", "--embeds", small_store, "--image", tmp_path / "torn.jpg", QUESTION)
    assert code == 2
    assert said.count("torn.jpg") == 1
    assert "failed: torn.jpg" in said


def test_a_model_that_did_not_make_the_store_is_refused(run_cli, small_store, unknown, family_checkpoint):
    other = family_checkpoint("qwen2_5_vl")
    code, _, said = run_cli("ask", "--embeds", small_store, "--image", unknown, "--model", other, QUESTION)
    assert code == 4
    assert len(said.splitlines()) == 1


def test_a_file_compared_with_what_the_store_has(run_cli, small_store, unknown):
    words = ("ask", "--embeds", small_store, "--compare", unknown, "--json", "--max-new-tokens", 3, "The same?")
    code, out, _ = run_cli(*words)
    assert code == 0
    pairs = [line["paths"] for line in map(json.loads, out.splitlines())]
    assert pairs == [["new.jpg", name] for name in ("chelsea.png", "coffee.png", "coins.png", "rocket.jpg")]


def test_answers_about_files_go_into_a_table_and_are_known_again(run_cli, small_store, unknown, tmp_path):
    words = ("ask", "--embeds", small_store, "--image", unknown, "--out", tmp_path / "t.parquet", QUESTION)
    assert "0 answers known, 1 asked" in run_cli(*words)[2]
    assert "1 answers known, 0 asked" in run_cli(*words)[2]


def test_a_gate_over_a_file_that_is_not_yet_extracted(run_cli, store, four_photos, photos, checkpoint, tmp_path):
    """It is judged by what was encoded for this run; without `--image` it is an error, as nothing is known of it."""
    folder, out = tmp_path / "kept", tmp_path / "kept embeds"
    shutil.copytree(four_photos, folder)
    run_cli("extract", folder, "--out", out, "--model", checkpoint)
    shutil.copyfile(photos / "turned.jpg", folder / "new.jpg")
    (tmp_path / "checks.toml").write_text(
        '[[check]]\nid = "a"\nquestion = "A?"\nchoices = ["yes", "no"]\nflag = "yes"\nmin_choice_mass = 0\n'
    )
    words = ("ask", "--embeds", out, "--checks", tmp_path / "checks.toml", "--fail-on", "block", "--json")
    for chosen in ([], ["--image", folder / "new.jpg"]):
        _, printed, _ = run_cli(*words, *chosen)
        verdicts = [line for line in map(json.loads, printed.splitlines()) if line["type"] == "verdict"]
        assert len(verdicts) == (1 if chosen else 5)
        assert ["error" in line for line in verdicts if line["path"] == "new.jpg"] == [not chosen]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["a.jpg"], "a.jpg is a file; did you mean --image a.jpg?"),
        (["a.jpg", "What is it?"], "a.jpg is a file; did you mean --image a.jpg?"),
        (["a.jpg", "b.jpg"], "a.jpg, b.jpg are files; did you mean --image before each of them?"),
        (["list.txt"], "list.txt is a file; did you mean --image or --questions list.txt?"),
    ],
)
def test_a_file_in_place_of_a_question_is_asked_back(run_cli, words, meant, tmp_path, monkeypatch, small_store):
    for name in ("a.jpg", "b.jpg", "list.txt"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert run_cli("ask", "--embeds", small_store, *words) == (2, "", f"qvsplit: {meant}\n")


def test_a_question_that_is_no_file_is_asked(run_cli, small_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder")
    words = ("--image", "coins.png", "--max-new-tokens", 2)
    assert run_cli("ask", "--embeds", small_store, "folder", "x" * 5000, *words)[0] == 0
