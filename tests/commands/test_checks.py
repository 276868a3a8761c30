"""`ask --checks` with a model that means what it says: the demo's. The gate is in test_gate.py."""

from __future__ import annotations

import json
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_checks_give_verdicts_and_an_exit_code(run_cli, postcards):
    words = ("ask", "--embeds", postcards, "--checks", EXAMPLES / "demo" / "moderation.toml")
    code, out, said = run_cli(*words, "--image", "s*.jpg")
    assert code == 0
    lines = [line.split("\t") for line in out.splitlines()]
    by_name = {(Path(line[1]).name, line[3]): line[4:] for line in lines}
    assert by_name["seaside.jpg", ""] == ["", "", "block", "dog"]
    assert by_name["seaside.jpg", "dog"][::2] == ["yes", "block"]
    assert by_name["sunday.jpg", "pack"] == ["", "", "pass", "skipped"]
    assert by_name["sunday.jpg", ""] == ["", "", "warn", "crowd"]
    assert said.strip() == "qvsplit: block: 2, warn: 1"
    assert run_cli(*words, "--image", "s*.jpg", "--fail-on", "block", "--quiet")[0] == 8
    assert run_cli(*words, "--image", "sunday.jpg", "--fail-on", "block", "--quiet")[0] == 0
    assert run_cli(*words, "--image", "sunday.jpg", "--fail-on", "warn", "--quiet")[0] == 8
    _, out, _ = run_cli(*words, "--image", "sunday.jpg", "--json")
    root = str(postcards.parent / "postcards")
    assert json.loads(out.splitlines()[-1]) == {
        "type": "verdict", "file": f"{root}/sunday.jpg", "path": "sunday.jpg", "root": root, "verdict": "warn",
        "flagged": ["crowd"], "uncertain": [],
    }  # fmt: skip


def test_the_album_of_the_examples_asks_what_it_says(run_cli, postcards, tmp_path):
    code, _, said = run_cli("ask", "--embeds", postcards, "--checks", EXAMPLES / "demo" / "album.toml",
                            "--out", tmp_path / "a.jsonl", "--report", tmp_path / "a.html")  # fmt: skip
    assert code == 0
    assert "14 images" in said  # with the failed one, a card of its own
    assert "uncertain" not in said
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    answers = {(one["path"], one["id"]): one["answer"] for one in records}
    assert len(answers) == 13 * 10
    assert answers["seaside.jpg", "place"] == "sea"
    assert answers["seaside.jpg", "house_colour"] == "purple"
    assert answers["parade.jpg", "water"] is None
    assert answers["winter.jpg", "weather"] == "snowy"
    page = (tmp_path / "a.html").read_text()
    thumbnails = page.split('class="thumbnails">')[1].split("</script>")[0]
    assert len(thumbnails.split()) == 12  # one is a copy of another


def test_the_examples_for_real_models_name_their_choices_and_nothing_of_the_demo():
    from qvsplit.answering.checks import read_checks

    for name in ("album", "moderation"):
        checks, of_demo = read_checks(EXAMPLES / f"{name}.toml"), read_checks(EXAMPLES / "demo" / f"{name}.toml")
        assert not {check.text for check in checks} & {check.text for check in of_demo}
        for check in checks:
            words = check.text.lower()
            assert not check.choices or "answer" in words
            for choice, spellings in check.spellings.items():
                assert any(spelling.lower() in words for spelling in spellings), (check.id, choice)
